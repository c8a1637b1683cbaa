"""The one way to compare speeds: blocks of every contender in turn, ratios block by block."""

from collections.abc import Callable, Mapping
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from core.measure import interleaved

Figures = dict[str, dict[str, Any]]  # by contender
Column = Callable[[dict[str, Any]], str]


class Contender(NamedTuple):
    """run: a block of training steps. peak: bytes of one step, state and batch included."""

    run: Callable[[], object]
    peak: Callable[[], int]


def contest(runs: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, reference: str) -> Figures:
    """Seconds of a block (median and quartiles over the rounds), and ratio: the median of the reference's time over
    the contender's in the same round."""
    seconds = interleaved(runs, rounds, device)
    figures: Figures = {}
    for name, blocks in seconds.items():
        lower, _, upper = quantiles(blocks, method="inclusive")
        ratio = median(a / b for a, b in zip(seconds[reference], blocks, strict=True))
        figures[name] = {"seconds": median(blocks), "lower_quartile": lower, "upper_quartile": upper, "ratio": ratio}
    return figures


def show(figures: Figures, title: str, columns: Mapping[str, Column], console: Console) -> None:
    """One row a contender; columns: what each shows of its figures, by title, without those where none has anything."""
    ran = [figure for figure in figures.values() if "error" not in figure]
    shown = {name: cell for name, cell in columns.items() if any(cell(figure) for figure in ran)}
    table = Table("contender", *shown, title=title)
    for name, figure in figures.items():
        table.add_row(name, *([figure["error"]] if "error" in figure else (cell(figure) for cell in shown.values())))
    console.print(table)


def optional(name: str, form: str) -> Column:
    """A column of figures that not every contender has, in this format."""
    return lambda figure: "" if figure.get(name) is None else format(figure[name], form)


def show_shares(figures: Figures, title: str, share: str, console: Console) -> None:
    """One row a contender: seconds, speed over the first one's, and the share, under this title."""
    columns = {
        "seconds": optional("seconds", ".4f"),
        f"× {next(iter(figures))}": optional("ratio", ".3f"),
        share: optional("share", ".2%"),
    }
    show(figures, title, columns, console)
