"""Figures of a study, drawn from its cells."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ablations.study.arms import BASELINE
from ablations.study.store import Result, Row

GREY, BLUE = "#777777", "#0072B2"  # Okabe and Ito: distinct to colour-blind readers and in grey print

Curves = list[tuple[list[float], list[float]]]  # x and validation accuracy in percent of every seed
AXES = {"epoch": "epoch", "seconds": "training seconds"}


# Paul Tol's bright scheme and greys: distinct to colour-blind readers; hatches tell them apart in grey print.
_STACK = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#004488", "#BBBBBB")
_HATCHES = ("", "//", "..", "\\\\", "", "xx", "++", "")


def kept(arms: dict[str, dict[str, int]], path: Path) -> None:
    """What a step keeps for its backward pass: a stacked bar an arm, by layer and operation; the small ones as one."""
    plt = pyplot()
    sums = Counter[str]()
    for made in arms.values():
        sums.update(made)
    shown = [name for name, _ in sums.most_common(len(_STACK) - 1)]
    parts = {name: [made.get(name, 0) / 2**20 for made in arms.values()] for name in shown}
    parts["other"] = [sum(size for name, size in made.items() if name not in shown) / 2**20 for made in arms.values()]
    figure, axis = plt.subplots(figsize=(8, 1.4 + 0.28 * len(arms)), layout="constrained")
    left = np.zeros(len(arms))
    for (name, sizes), colour, hatch in zip(parts.items(), _STACK, _HATCHES, strict=False):
        axis.barh(list(arms), sizes, left=left, color=colour, hatch=hatch, edgecolor="white", linewidth=0.4, label=name)
        left += sizes
    axis.invert_yaxis()
    axis.set_xlabel("MiB kept for the backward pass of a step")
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(figure, path)


def pyplot() -> Any:
    """matplotlib.pyplot, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path) -> None:
    """Write and close a figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    pyplot().close(figure)


def accuracy(cells: Sequence[tuple[Result, list[Row]]], x: str, path: Path) -> None:
    """Validation accuracy by "epoch" or "seconds": a panel an arm, the baseline in grey in each."""
    plt = pyplot()
    curves = _curves(cells, x)
    baseline = curves.pop(BASELINE, None)
    panels = curves or {BASELINE: baseline or []}
    columns = min(len(panels), 4)
    lines = -(-len(panels) // columns)
    size = (max(3.2 * columns, 4.5), 2.6 * lines + 0.3)
    figure, axes = plt.subplots(
        lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (arm, seeds) in zip(axes.flat, panels.items(), strict=False):
        if baseline and arm != BASELINE:
            _draw(axis, baseline, GREY, "--", BASELINE)
        _draw(axis, seeds, BLUE, "-", "the panel's arm" if len(panels) > 1 else arm)
        axis.set_title(arm, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7, loc="lower right")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel(AXES[x], fontsize=10)
    figure.supylabel("validation accuracy, %", fontsize=10)
    save(figure, path)


def _curves(cells: Sequence[tuple[Result, list[Row]]], x: str) -> dict[str, Curves]:
    by_arm = groupby(sorted(cells, key=lambda cell: cell[0]["arm"]), key=lambda cell: cell[0]["arm"])
    return {
        arm: [([row[x] for row in rows], [100 * row["val/accuracy"] for row in rows]) for _, rows in group]
        for arm, group in by_arm
    }


def _draw(axis, seeds: Curves, colour: str, style: str, label: str) -> None:  # type: ignore[no-untyped-def]
    """Each seed thin, their mean thick (at the mean of their x)."""
    if len(seeds) > 1:
        for x, y in seeds:
            axis.plot(x, y, style, color=colour, linewidth=0.7, alpha=0.5)
        label += f", mean of {len(seeds)} seeds"
    x_mean, y_mean = np.mean(np.array(seeds), axis=0)
    axis.plot(x_mean, y_mean, style, color=colour, linewidth=1.8, marker="." if len(x_mean) < 3 else None, label=label)
