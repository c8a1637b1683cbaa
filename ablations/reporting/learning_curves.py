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
        mean, deviation = (100 * values for values in comparisons.curve(arm, "val/accuracy"))
        x, several = np.arange(1, len(mean) + 1), len(comparisons.study.arms[arm]) > 1
        axis.plot(x, mean, style, color=colour, linewidth=1.6, label=arm)
        if several and len(x) > 1:
            axis.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.12, linewidth=0)
        elif several:
            axis.errorbar(x, mean, deviation, color=colour, capsize=3)
        for i in range(0, len(x), -(-len(x) // _MARKS)):
            (mark,) = axis.plot(x[i], mean[i], marker, color=colour, markersize=4)
            tell(mark, f"{arm}, epoch {x[i]}: {mean[i]:.2f}" + f" ± {deviation[i]:.2f}" * several + " %")
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
