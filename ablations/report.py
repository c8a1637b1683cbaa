"""What a study concludes, rebuilt from its cells: python ablations/report.py runs/NAME [runs/NAME …]"""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this code, installed or not

from ablations.study.speaking import asked, one_message, words
from core import plugins
from core.errors import InputError


@dataclass(frozen=True)
class Command:
    """Rebuild the report of a study from its cells, or join several of one configuration."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Studies that run.py wrote, such as runs/quick-digits."""
    plugin: tuple[str, ...] = ()
    """Python files that the study's optimizations are in; those of installed packages are found."""
    out: Path | None = None
    """Where the report goes: report/ in the study's folder, or for several studies in one named after them. Nothing
    there is replaced but what an earlier report wrote."""
    target: float | None = None
    """Accuracy in percent to report the time to; one that the baseline reached unless given."""


def main() -> None:
    """Exit status: 0, or 2 for bad input."""
    with one_message():
        command = asked(Command, words())
        if not command.folders:
            raise InputError("no study given; write python ablations/report.py runs/NAME")
        from ablations.reporting.compose import write  # pandas and matplotlib: not for --help

        plugins.load(command.plugin)
        paths = write(command.folders, command.out, command.target)
        print("\n".join(map(str, paths)))


if __name__ == "__main__":
    main()
