"""What arms cost: accuracy against time and memory, and what each keeps for its backward pass."""

from collections import Counter
from pathlib import Path

import numpy as np

from ablations.analysis.comparisons import Comparisons
from ablations.reporting.plotting import BLUE, GREY, pyplot, save
from ablations.study.arms import AGAIN, BASELINE

# Paul Tol's bright scheme and greys: distinct to colour-blind readers; hatches tell them apart in grey print.
_STACK = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#004488", "#BBBBBB")
_HATCHES = ("", "//", "..", "\\\\", "", "xx", "++", "")


def pareto(comparisons: Comparisons, path: Path) -> None:
    """Accuracy against step time and peak memory, each with its front."""
    cells = comparisons.cells[comparisons.cells["arm"] != AGAIN]
    costs = {
        "step time": ("step, ms", cells["step_ms_median"]),
        "peak memory": ("peak, MiB", cells["peak_bytes"] / 2**20),
    }
    figure, axes = pyplot().subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    for axis, (name, (title, cost)) in zip(axes, costs.items(), strict=True):
        front = comparisons.front("accuracy", name)
        groups = cells.assign(x=cost, y=100 * cells["accuracy"]).groupby("arm")[["x", "y"]]
        means, deviations = groups.mean(), groups.std(ddof=1).fillna(0)
        for arm, (x, y) in means.iterrows():
            best = arm in front
            colour = BLUE if best else GREY
            dx, dy = deviations.loc[arm]
            axis.errorbar(x, y, dy, dx, color=colour, linewidth=0.6, alpha=0.8 if best else 0.35)
            marker = "s" if arm == BASELINE else "o"
            axis.plot(x, y, marker, color=colour, markerfacecolor=colour if best else "white", markersize=6)
            if best or arm == BASELINE:
                axis.annotate(arm, (x, y), (5, 6), textcoords="offset points", fontsize=8)
        steps = means.loc[front].sort_values("x")
        axis.plot(steps["x"], steps["y"], color=BLUE, linewidth=0.8, alpha=0.6)
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
        axis.margins(x=0.12)
    axes[0].set_ylabel("validation accuracy after the last epoch, %")
    save(figure, path)


def kept(comparisons: Comparisons, path: Path) -> None:
    """What a step keeps for its backward pass: a stacked bar an arm, by layer and operation; the small ones as one."""
    arms = {arm: cells[0].result["kept_by_op"] for arm, cells in comparisons.study.arms.items()}
    sums = Counter[str]()
    for made in arms.values():
        sums.update(made)
    shown = [name for name, _ in sums.most_common(len(_STACK) - 1)]
    parts = {name: [made.get(name, 0) / 2**20 for made in arms.values()] for name in shown}
    parts["other"] = [sum(size for name, size in made.items() if name not in shown) / 2**20 for made in arms.values()]
    figure, axis = pyplot().subplots(figsize=(8, 1.4 + 0.28 * len(arms)), layout="constrained")
    left = np.zeros(len(arms))
    for (name, sizes), colour, hatch in zip(parts.items(), _STACK, _HATCHES, strict=False):
        axis.barh(list(arms), sizes, left=left, color=colour, hatch=hatch, edgecolor="white", linewidth=0.4, label=name)
        left += sizes
    axis.invert_yaxis()
    axis.set_xlabel("MiB kept for the backward pass of a step")
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(figure, path)
