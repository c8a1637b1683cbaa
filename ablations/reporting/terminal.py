"""What a study concludes, on the terminal."""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ablations.analysis.comparisons import Comparisons, compare
from ablations.reporting import sections
from ablations.reporting.compose import write_comparisons
from ablations.reporting.words import pays, sentences

_COLOURS = {
    r"\bbetter\b": "bold green",
    r"\bno worse\b": "green",
    r"(?<!no )\bworse\b": "bold red",
    r"\bundecided\b": "yellow",
    r"\bnot timed\b": "yellow",
}


def conclude(out: Path, console: Console) -> None:
    """Write the report of the study in this folder, and print its verdicts and what they rest on."""
    comparisons = compare([out])
    written = write_comparisons(comparisons, out / "report")
    console.print(verdict_table(comparisons))
    for sentence in [*pays(comparisons), "", *sentences(comparisons)]:
        console.print(_coloured(f"* {sentence}" if sentence else ""), soft_wrap=True)
    console.print(
        f"\n{written[1]}   tensorboard --logdir {out / 'report' / 'tensorboard'}", highlight=False, soft_wrap=True
    )


def verdict_table(comparisons: Comparisons) -> Table:
    """The report's first table, verdicts in colour."""
    frame = sections.verdict_table(comparisons)
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_lines=False)
    for title in frame.columns:
        grid.add_column(title, overflow="fold", min_width=10)
    for row in frame.itertuples(index=False):
        grid.add_row(*(_coloured(str(text).replace(", ", ",\N{NO-BREAK SPACE}")) for text in row))
    return grid


def _coloured(text: str) -> Text:
    out = Text(text.replace("**", "").replace("`", ""))
    for words, style in _COLOURS.items():
        out.highlight_regex(words, style)
    return out
