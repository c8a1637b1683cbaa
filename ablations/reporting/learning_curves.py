"""Validation accuracy on the way: the arms that say most on one axis."""

from pathlib import Path

import numpy as np

from ablations.analysis.comparisons import Comparisons
from ablations.reporting.plotting import LINES, pyplot, save

_AXES = {"epoch": "epoch", "seconds": "training seconds (mean of the seeds)"}


def draw(comparisons: Comparisons, path: Path) -> None:
    """At equal steps and at equal time: each arm's mean over seeds, with a band of a standard deviation."""
    figure, axes = pyplot().subplots(1, 2, figsize=(12, 4.6), sharey=True, layout="constrained")
    for axis, (key, title) in zip(axes, _AXES.items(), strict=True):
        for arm, (colour, marker, style) in zip(comparisons.curves(len(LINES)), LINES, strict=False):
            rows = [cell.rows for cell in comparisons.study.arms[arm]]
            x = np.mean([[row[key] for row in one] for one in rows], axis=0)
            y = np.array([[100 * row["val/accuracy"] for row in one] for one in rows])
            shown = marker if len(x) < 3 else None
            axis.plot(x, y.mean(0), style, color=colour, marker=shown, linewidth=1.8, label=arm)
            if len(y) > 1:
                deviation = y.std(0, ddof=1)
                axis.fill_between(
                    x, y.mean(0) - deviation, y.mean(0) + deviation, color=colour, alpha=0.12, linewidth=0
                )
                if len(x) == 1:
                    axis.errorbar(x, y.mean(0), deviation, color=colour, capsize=3)
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation accuracy, %")
    axes[1].legend(fontsize=8, loc="lower right")
    save(figure, path)
