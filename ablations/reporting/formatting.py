"""Markdown of the reports: tables, and differences with their intervals."""

from collections.abc import Sequence
from math import isnan
from statistics import mean, stdev

from ablations.analysis.comparisons import Response
from ablations.analysis.estimates import Estimate


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, a line each."""
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def spread(values: Sequence[float], form: str, shown: bool = True) -> str:
    """The mean, with the standard deviation where there are several different values."""
    centre = format(mean(values), form)
    return f"{centre} ± {format(stdev(values), form)}" if shown and len(set(values)) > 1 else centre


def interval(response: Response, found: Estimate | None, of: int = 1) -> str:
    """`+1.25 [−0.40, +2.90]`, bold if the interval excludes zero, without one if there is none; — for no estimate."""
    if found is None:
        return "—"
    value = response.text(found.value)
    if isnan(found.se):
        return value
    low, high = (response.text(x) for x in found.interval(of=of))
    bounds = f" [{low}, {high}]" if low != high else ""
    return f"**{value}**{bounds}" if found.clear(of) and response.visible(found.value) else f"{value}{bounds}"


def listed(names: Sequence[str]) -> str:
    """`a`, `b` and `c`."""
    quoted = [f"`{name}`" for name in names]
    return " and ".join(filter(None, [", ".join(quoted[:-1]), *quoted[-1:]]))
