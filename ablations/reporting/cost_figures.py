"""What arms cost: accuracy against time and memory, and what each keeps for its backward pass."""

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from ablations.analysis.comparisons import Comparisons
from ablations.analysis.factors import levels
from ablations.reporting.plotting import BLUE, GREY, pyplot, save, tell
from ablations.study.arms import AGAIN, BASELINE

_STACK = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#004488", "#BBBBBB")  # Paul Tol, bright
_BARS = 12


def pareto(comparisons: Comparisons, path: Path) -> None:
    """Accuracy against step time and peak memory, each with its front; it, the baseline and singles are named."""
    accuracy = 100 * comparisons.means["accuracy"].drop(index=AGAIN, errors="ignore")
    spread = 100 * comparisons.cells.groupby("arm")["accuracy"].std().fillna(0)
    figure, axes = pyplot().subplots(1, 2, figsize=(12, 5.2), sharey=True, layout="constrained")
    for axis, (name, cost) in zip(axes, _costs(comparisons).items(), strict=True):
        front = comparisons.front("accuracy", name)
        for arm, y in accuracy.items():
            x, low, high = cost.loc[arm, ["at", "low", "high"]]
            deviation = spread[comparisons.twins[arm]]
            best = arm in front
            colour = BLUE if best else GREY
            axis.errorbar(x, y, deviation, [[x - low], [high - x]], color=colour, linewidth=0.6, alpha=0.4)
            (mark,) = axis.plot(x, y, "s" if arm == BASELINE else "o", color=colour, markersize=6)
            mark.set_markerfacecolor(colour if best else "white")
            bounds = f" [{low:,.3g}, {high:,.3g}]" if high > low else ""
            tell(mark, f"{arm}: accuracy {y:.2f} ± {deviation:.2f} %, {cost.attrs['title']} {x:,.4g}{bounds}")
            if best or len(levels(arm)) <= 1:
                axis.annotate(arm, (x, y), (6, 6), textcoords="offset points", fontsize=8, color=colour)
        steps = pd.DataFrame({"x": cost["at"], "y": accuracy}).loc[front].sort_values("x")
        axis.plot(steps["x"], steps["y"], color=BLUE, linewidth=0.8, alpha=0.6)
        axis.set_xlabel(cost.attrs["title"])
        axis.grid(alpha=0.3)
        axis.margins(x=0.12)
    axes[0].set_ylabel("validation accuracy after the last epoch, %")
    save(figure, path)


def _costs(comparisons: Comparisons) -> dict[str, pd.DataFrame]:
    """Of step time and peak memory every arm's value with its ends: of the timing pass where there is one."""
    groups = comparisons.cells.groupby("arm")
    memory = groups["peak_bytes"].max() / 2**20
    times = groups["step_ms_median"]
    cells = pd.DataFrame({"at": times.mean(), "low": times.min(), "high": times.max()})
    cells.attrs["title"] = "step time of the cells, ms (not interleaved)"
    if not comparisons.times.empty:
        cells = comparisons.times.reindex(groups.groups)
        cells.attrs["title"] = "step time, × baseline"
    peaks = pd.DataFrame({"at": memory, "low": memory, "high": memory})
    peaks.attrs["title"] = "peak memory, MiB"
    return {"step time": cells, "peak memory": peaks}


def kept(comparisons: Comparisons, path: Path) -> None:
    """What a step keeps for its backward pass: a bar for each arm that differs from those before it, by layer and
    operation; the small ones as one."""
    alike: dict[tuple[tuple[str, int], ...], list[str]] = {}
    for arm, cells in comparisons.study.arms.items():
        alike.setdefault(tuple(sorted(cells[0].result["kept_by_op"].items())), []).append(arm)
    bars = {_named(arms): (dict(made), arms) for made, arms in list(alike.items())[:_BARS]}
    most = Counter[str]()  # of any arm
    for made, _ in bars.values():
        most |= Counter(made)
    shown = [name for name, _ in most.most_common(len(_STACK) - 1)]
    figure, axis = pyplot().subplots(figsize=(10, 1.2 + 0.34 * len(bars)), layout="constrained")
    left = np.zeros(len(bars))
    for name, colour in zip([*shown, "other"], _STACK, strict=False):
        sizes = [
            sum(s for n, s in m.items() if n == name or (name == "other" and n not in shown)) for m, _ in bars.values()
        ]
        mib = np.array(sizes) / 2**20
        drawn = axis.barh(list(bars), mib, 0.7, left, color=colour, edgecolor="white", linewidth=0.4, label=name)
        for mark, size, (made, arms) in zip(drawn, mib, bars.values(), strict=True):
            tell(mark, f"{', '.join(arms)}: {name} {size:,.2f} of {sum(made.values()) / 2**20:,.2f} MiB")
        left += mib
    axis.invert_yaxis()
    axis.set_xlabel("MiB kept for the backward pass of a step")
    axis.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    save(figure, path)


def _named(arms: list[str]) -> str:
    return arms[0] + (f" (and {len(arms) - 1} alike)" if len(arms) > 1 else "")
