"""What a study concludes, on the terminal."""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from ablations.analysis.comparisons import Comparisons
from ablations.reporting import published, sections
from ablations.reporting.compose import write_comparisons
from ablations.reporting.words import sentences
from ablations.study.reading import read


def conclude(out: Path, console: Console) -> None:
    """Write the report of the study in this folder, and print its table, its summary and the published figures."""
    comparisons = Comparisons(read([out]))
    written = write_comparisons(comparisons, out / "report")
    _show(console, comparisons)
    study = comparisons.study
    lines = [f"* {sentence}" for sentence in sentences(comparisons)]
    lines += ["", *published.beside(study.configuration, study.environment, [*study.results, *study.failed])]
    console.print("\n".join(lines).replace("**", "").replace("`", ""), markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"\n{written[1]}   tensorboard --logdir {out / 'report' / 'tensorboard'}", highlight=False, soft_wrap=True
    )


def _show(console: Console, comparisons: Comparisons) -> None:
    """The table of the report, of each arm's results."""
    frame = sections.measurements(comparisons, brief=True)
    grid = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    grid.add_column(frame.columns[0], overflow="fold")
    for title in frame.columns[1:]:
        grid.add_column(title, justify="right", no_wrap=True)
    for row in frame.itertuples(index=False):
        grid.add_row(*row)
    console.print(grid)
