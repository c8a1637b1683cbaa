"""Effects and interactions, drawn."""

from itertools import combinations
from math import isfinite
from pathlib import Path

import numpy as np

from ablations.analysis.comparisons import Comparisons
from ablations.analysis.factors import levels
from ablations.analysis.responses import RESPONSES, Response
from ablations.reporting.formatting import told
from ablations.reporting.plotting import BLUE, GREY, LINES, pyplot, save


def effects(comparisons: Comparisons, path: Path) -> None:
    """A panel a response: every effect with its interval alone and together with the others."""
    frame = comparisons.effect_table
    names = list(frame["effect"].unique())
    mains = frame.loc[frame["order"] == 1, "effect"].nunique()
    size = (13, 1.5 + 0.3 * len(names))
    figure, axes = pyplot().subplots(1, len(RESPONSES), figsize=size, sharey=True, layout="constrained")
    for axis, response in zip(axes, RESPONSES, strict=True):
        ends = [0.0]
        for row in frame[frame["response"] == response.name].to_dict("records"):
            at, value = -names.index(row["effect"]), response.shown(row["estimate"])
            for which, width in (("_together", 1.0), ("", 3.5)):
                low, high = (response.shown(row[end + which]) for end in ("low", "high"))
                axis.plot([low, high], [at, at], color=BLUE, linewidth=width)
            axis.plot(value, at, "o", color=BLUE, markerfacecolor=BLUE if told(row) else "white")
            ends += [x for x in (value, low, high) if isfinite(x)]
        margin = 0.25 * (max(ends) - min(ends)) or 1.0
        axis.set_xlim(min(ends) - margin, max(ends) + margin)  # longer intervals run out of the panel
        axis.axvline(0, color=GREY, linewidth=0.8)
        if mains < len(names):
            axis.axhline(0.5 - mains, color=GREY, linewidth=0.6, linestyle="--")
        axis.set_title(response.name)
        axis.set_xlabel(response.unit or "cross entropy")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(-np.arange(len(names)), names)
    save(figure, path)


def interactions(comparisons: Comparisons, response: Response, path: Path) -> None:
    """A panel a pair of factors: means of the response over all arms with each two of their levels, bars the standard
    deviation over seeds."""
    plt = pyplot()
    design = comparisons.effects[response.name].design
    pairs = [p for p in combinations(design.factors, 2) if any({a, b} == set(p) for (a, _), (b, _) in design.pairs)]
    columns = min(3, len(pairs))
    size = (4.2 * columns, 3.0 * -(-len(pairs) // columns) + 0.3)
    figure, axes = plt.subplots(
        -(-len(pairs) // columns), columns, figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    cells = comparisons.cells[comparisons.cells["arm"].isin(design.arms)]
    for factor in design.factors:
        cells = cells.assign(**{factor: [levels(arm).get(factor, "off") for arm in cells["arm"]]})
    for axis, (first, second) in zip(axes.flat, pairs, strict=False):
        names = design.factors[first]
        by_seed = cells.groupby([second, first, "seed"])[response.name].mean().map(response.absolute)
        shown = by_seed.groupby([second, first]).agg(["mean", "std"]).fillna(0)
        for i, ((colour, marker, style), level) in enumerate(zip(LINES, design.factors[second], strict=False)):
            points = shown.loc[level].reindex([name for name in names if name in shown.loc[level].index])
            at = np.array([names.index(name) for name in points.index]) + 0.05 * i
            axis.errorbar(
                at, points["mean"], points["std"], color=colour, marker=marker, linestyle=style, capsize=2,
                label=f"{second} {level}",
            )  # fmt: skip
        axis.set_xticks(range(len(names)), names)
        axis.set_xlabel(first)
        axis.set_xlim(-0.3, len(names) - 0.7)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
        if response.name in ("step time", "peak memory"):
            axis.set_yscale("log")
            for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                ticks(plt.matplotlib.ticker.StrMethodFormatter("{x:g}"))
    for axis in axes.flat[len(pairs) :]:
        axis.set_visible(False)
    figure.supylabel(f"{response.name}, {response.scale}", fontsize=10)
    save(figure, path)
