"""The commands, called in this process, and studies in which nothing takes long."""

import pytest

from ablations.reporting import figures
from ablations.study import timing


def call(main, *words):
    """Exit status of a command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["command", *map(str, words)])
        try:
            main()
        except SystemExit as stop:
            return stop.code or 0
        return 0


def hurry(patch):
    """Draw no figure, and time nothing for long."""
    patch.setattr(figures, "draw", lambda comparisons, out: {})
    patch.setattr(timing, "BLOCK", 0.001)
    patch.setattr(timing, "ROUNDS", 2)
    patch.setattr(timing, "SHARE", 0)
    patch.setattr(timing, "MOST", 0)
    patch.setattr(timing.measure, "ceiling", lambda dtype, device: 1e11)
