"""What a study shows on the terminal while it runs."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ablations.study.store import Result, Row


class Terminal:
    """A progress bar of the whole study above one line a finished cell. Use as a context manager."""

    def __init__(self, console: Console, cells: int) -> None:
        self._console = console
        self._cells = cells
        self._left = cells
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:3.0f} %"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._name = ""

    def __enter__(self) -> "Terminal":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def cell(self, arm: str, seed: int, steps: int) -> None:
        """A cell starts: the bar counts the steps of all cells that are left."""
        self._name = f"{arm} seed {seed}"
        if self._task is None:
            self._task = self._bar.add_task(self._name, total=steps * self._cells)
        else:
            done = steps * (self._cells - self._left)
            self._bar.update(self._task, completed=done, description=self._name)

    def step(self) -> None:
        """Advance by a step."""
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
        self._left -= 1
        head = f"[{self._cells - self._left}/{self._cells}] {outcome['arm']} seed {outcome['seed']}: "
        if "error" in outcome:
            self._console.print(head + f"failed: {outcome['error']}", markup=False, highlight=False)
            return
        self._console.print(
            f"{head}val {100 * outcome['best_val_accuracy']:.2f} %, {outcome['train_seconds']:.1f} s, "
            f"{outcome['images_per_second']:,.0f} images/s, {outcome['peak_bytes'] / 2**20:,.0f} MiB",
            markup=False,
            highlight=False,
        )

    def note(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
