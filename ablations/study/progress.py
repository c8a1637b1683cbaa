"""What a study shows on the terminal while it runs."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from ablations.study.outcomes import failed, finished
from ablations.study.store import Result, Row


class Terminal:
    """A progress bar of the whole study above one line a finished cell. Use as a context manager.

    cells: their folders, in which other processes finish some, too; they are counted in the order of finishing.
    bar: False for one of several processes that share the terminal.
    """

    def __init__(self, console: Console, cells: Sequence[Path] = (), bar: bool = True) -> None:
        self._console = console
        self._cells = cells
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:3.0f} %"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not bar,
        )
        self._task: TaskID | None = None
        self._name = ""

    def __enter__(self) -> "Terminal":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def cell(self, arm: str, seed: int, steps: int, done: int = 0) -> None:
        """A cell starts: the bar counts the steps of all cells."""
        self._name = f"{arm} seed {seed}"
        completed = steps * len(self._ends()) + done
        if self._task is None:
            self._task = self._bar.add_task(self._name, total=steps * len(self._cells), completed=completed)
        self._bar.update(self._task, completed=completed, description=self._name)

    def step(self) -> None:
        """A training step was issued."""
        if self._task is not None:
            self._bar.advance(self._task)

    def epoch(self, row: Row) -> None:
        """Show the epoch's figures beside the bar."""
        if self._task is not None:
            text = (
                f"{self._name}  epoch {row['epoch']:.0f}  loss {row['train/loss']:.4f}  "
                f"val {100 * row['val/accuracy']:.2f} %  {row['speed/images_per_second']:,.0f} images/s"
            )
            self._bar.update(self._task, description=text)

    def done(self, outcome: Result) -> None:
        """Print one line for the cell."""
        name = f"{outcome['arm']} seed {outcome['seed']}"
        head = f"{self._place(name)}{name}: "
        if "error" in outcome:
            self.note(head + f"failed: {outcome['error']}")
            return
        self.note(
            f"{head}val {100 * outcome['best_val_accuracy']:.2f} %, {outcome['train_seconds']:.1f} s, "
            f"{outcome['images_per_second']:,.0f} images/s, {outcome['peak_bytes'] / 2**20:,.0f} MiB"
        )

    def note(self, text: str) -> None:
        """Print a line. Where it cannot be, the study goes on."""
        with suppress(OSError):
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _place(self, name: str) -> str:
        """[3/24], of the third that ended of 24 cells; empty where one is all there is to do."""
        ends = self._ends()
        return f"[{sum(end <= ends[name] for end in ends.values())}/{len(self._cells)}] " if name in ends else ""

    def _ends(self) -> dict[str, int]:
        """When each cell ended that has, by its name."""
        ends = {}
        for cell in self._cells:
            file = cell / "result.json" if finished(cell) else cell / "failed.json" if failed(cell) else None
            with suppress(FileNotFoundError):  # --retry-failed elsewhere, just now
                if file:
                    ends[f"{cell.parent.name} seed {cell.name.removeprefix('seed')}"] = file.stat().st_mtime_ns
        return ends
