"""The best model of a cell, evaluated again: python ablations/evaluate.py runs/quick-digits/cells/flash/seed0"""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this code, installed or not

from ablations.study import evaluation
from ablations.study.machine import named, ready
from ablations.study.speaking import asked, one_message, words
from core import plugins
from core.data import sets


@dataclass(frozen=True)
class Command:
    """Evaluate the best model of a cell again, from its checkpoint."""

    cell: Annotated[Path, tyro.conf.Positional]
    """The cell's folder, such as runs/quick-digits/cells/flash/seed0."""
    data: str | None = None
    """The data set; the one it was trained on unless given."""
    data_root: Path = Path("data")
    """Where downloads and the cache of decoded images are kept."""
    plugin: tuple[str, ...] = ()
    """Python files that the cell's optimizations or data set are in."""
    model: str | None = None
    """The model of others that the cell trained, if it is of a file: module:FILE.py:FUNCTION."""
    device: str = "auto"
    """auto, cpu or cuda."""


def main() -> None:
    """Exit status: 0, or 2 for bad input."""
    with one_message():
        command = asked(Command, words())
        device = ready(named(command.device))
        plugins.load(command.plugin)
        model = evaluation.load(command.cell, command.model)
        data = sets.load(command.data or model.about["data"], command.data_root, model.recipe.image)
        trained_on = (model.about.get("identity") or {}).get("data")
        changed = command.data is None and trained_on not in (None, data.digest())
        data = data.holding_out(model.about["seed"])
        result = evaluation.accuracy(model, data, device)
        print(
            f"{model.arm.name}, seed {model.about['seed']}, on {data.name}: {100 * result.accuracy:.2f} % of "
            f"{len(result.correct):,} validation images, loss {result.loss:.4f} (recorded on {model.about['data']}: "
            f"{100 * model.about['accuracy']:.2f} %{', whose images or labels were others then' * changed})"
        )


if __name__ == "__main__":
    main()
