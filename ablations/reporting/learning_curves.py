"""Validation accuracy on the way: the arms that say most on one axis."""

from pathlib import Path

import numpy as np

from ablations.analysis.comparisons import Comparisons
from ablations.reporting.plotting import LINES, pyplot, save, tell

_MARKS = 30  # of a curve, that tell their value


def draw(comparisons: Comparisons, path: Path) -> None:
    """By epoch: each arm's mean over seeds, with a band of a standard deviation. An exact arm is drawn as its twin."""
    arms = list(dict.fromkeys(comparisons.twins[arm] for arm in comparisons.curves(len(LINES))))
    figure, axis = pyplot().subplots(figsize=(10, 4.8), layout="constrained")
    lowest = []
    for arm, (colour, marker, style) in zip(arms, LINES, strict=False):
        rows = [cell.rows for cell in comparisons.study.arms[arm]]
        x = np.array([row["epoch"] for row in rows[0]])
        y = 100 * np.array([[row["val/accuracy"] for row in one] for one in rows])
        mean, deviation = y.mean(0), y.std(0, ddof=1) if len(y) > 1 else np.zeros(len(x))
        axis.plot(x, mean, style, color=colour, linewidth=1.6, label=arm)
        if len(y) > 1 and len(x) > 1:
            axis.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.12, linewidth=0)
        elif len(y) > 1:
            axis.errorbar(x, mean, deviation, color=colour, capsize=3)
        for i in range(0, len(x), -(-len(x) // _MARKS)):
            (mark,) = axis.plot(x[i], mean[i], marker, color=colour, markersize=4)
            tell(mark, f"{arm}, epoch {x[i]}: {mean[i]:.2f}" + f" ± {deviation[i]:.2f}" * (len(y) > 1) + " %")
        lowest.append(mean[len(mean) // 5])
    if len(x) > 1:  # the beginning, alike in all arms, would take the height that the end needs
        axis.set_ylim(bottom=min(lowest))
        axis.xaxis.get_major_locator().set_params(integer=True)
    else:
        axis.set_xticks(x)
    axis.set_xlabel("epoch")
    axis.set_ylabel("validation accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    save(figure, path)
