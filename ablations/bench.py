"""Training speed against the peers: python ablations/bench.py (needs the extra test)"""

import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this code, installed or not

from rich.console import Console

from ablations.benchmarks.comparing import Bench, compared, settled
from ablations.study.machine import environment, ready
from ablations.study.speaking import asked, one_message, words
from ablations.study.store import write_json
from core.errors import InputError
from core.measure import gpu_state


def main() -> None:
    """Exit status: 0, or 2 for bad input."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
    with one_message():
        bench = settled(asked(Bench, words()))
        device = ready(bench.device)
        try:
            figures = compared(bench, console)
        except ModuleNotFoundError as error:
            raise InputError(f"{error}; pip install -e '.[test]'") from error
        if bench.json:
            settings, environments = asdict(replace(bench, json=None)), environment(bench.device) | gpu_state(device)
            write_json(bench.json.resolve(), {"bench": settings, "environment": environments, "figures": figures})


if __name__ == "__main__":
    main()
