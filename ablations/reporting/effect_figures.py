"""Figures of what a study concludes: effects, accuracy against cost, interactions, the half-normal plot."""

from collections.abc import Callable
from itertools import combinations
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ablations.analysis.comparisons import BY_NAME, RESPONSES, Response, Views
from ablations.analysis.effects import Effects, label, levels
from ablations.reporting.figures import BLUE, GREY, pyplot, save
from ablations.study.arms import AGAIN, BASELINE

_ORANGE = "#D55E00"
_LINES = ((BLUE, "o", "-"), (_ORANGE, "s", "--"), ("#009E73", "^", ":"), ("#CC79A7", "D", "-."))

CAPTIONS = {
    "effects": "Effects on each response. Thick: 95 % interval; thin: 95 % for all effects of a panel together; "
    "filled: zero is outside the thin one. Long ones run out of the panel. Dashed: interactions begin below.",
    "pareto": "Accuracy after the last epoch against step time and peak memory: means over seeds, bars ± standard "
    "deviation. Filled: no arm has better means in both, within noise or not. The line joins these.",
    "half_normal": "Half-normal plot of the standardised contrasts of one seed: noise lies on the line, effects above "
    "the dashed margin (Lenth) stand out.",
    "interactions_accuracy": "Interactions in accuracy: means over all arms with these two levels. Parallel lines: no "
    "interaction. Bars: standard deviation over seeds.",
    "interactions_step_time": "Interactions in step time (logarithmic scale): parallel lines multiply.",
    "interactions_peak_memory": "Interactions in peak memory (logarithmic scale): parallel lines multiply.",
    "interactions_loss": "Interactions in validation loss.",
    "accuracy_by_epoch": "Validation accuracy by epoch.",
    "accuracy_by_second": "Validation accuracy by seconds of training.",
    "kept_bytes": "Bytes kept for the backward pass, by layer and operation.",
}


def draw(views: Views, folder: Path) -> dict[str, Path]:
    """All figures that the study has something for, by name."""
    wanted: dict[str, Callable[[Path], None]] = {}
    if len(views.study.arms) > 1:
        wanted["pareto"] = lambda path: pareto(views, path)
    if views.effects["accuracy"].effects:
        wanted["effects"] = lambda path: effects(views.effects, path)
    judged = [r for r in RESPONSES if r.random and (n := views.noise[r.name]) and not isnan(n.deviation)]
    if judged:
        wanted["half_normal"] = lambda path: half_normal(views, judged, path)
    if any(len(e.term) == 2 for e in views.effects["accuracy"].effects):
        for response in RESPONSES:
            if response.name != "loss":
                name = f"interactions_{response.name.replace(' ', '_')}"
                wanted[name] = lambda path, response=response: interactions(views, response, path)  # type: ignore[misc]
    drawn = {name: folder / f"{name}.png" for name in wanted}
    for name, path in drawn.items():
        wanted[name](path)
    return drawn


def effects(found: dict[str, Effects], path: Path) -> None:
    """A panel a response: every effect with its interval alone and together with the others."""
    plt = pyplot()
    terms = [effect.term for effect in found["accuracy"].effects]
    y = -np.arange(len(terms), dtype=float)
    figure, axes = plt.subplots(1, len(found), figsize=(13, 1.5 + 0.3 * len(terms)), sharey=True, layout="constrained")
    for axis, (name, these) in zip(axes, found.items(), strict=True):
        response = BY_NAME[name]
        for at, effect in zip(y, these.effects, strict=True):
            e = effect.estimate
            for of, width in ((these.together, 1.0), (1, 3.5)):
                if not isnan(e.se):
                    low, high = e.interval(of=of)
                    axis.plot([response.shown(low), response.shown(high)], [at, at], color=BLUE, linewidth=width)
            full = e.clear(these.together) and response.visible(e.value)
            axis.plot(response.shown(e.value), at, "o", color=BLUE, markerfacecolor=BLUE if full else "white")
        ends = [response.shown(x) for _, e in these.effects for x in (e.value, *e.interval()) if not isnan(x)]
        margin = 0.25 * (max(*ends, 0) - min(*ends, 0)) or 1.0
        axis.set_xlim(min(*ends, 0) - margin, max(*ends, 0) + margin)  # longer intervals run out of the panel
        axis.axvline(0, color=GREY, linewidth=0.8)
        mains = sum(len(term) == 1 for term in terms)
        if mains < len(terms):
            axis.axhline(0.5 - mains, color=GREY, linewidth=0.6, linestyle="--")
        axis.set_title(name)
        axis.set_xlabel(response.unit or "cross entropy")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(y, [label(term) for term in terms])
    save(figure, path)


def pareto(views: Views, path: Path) -> None:
    """Accuracy against step time and peak memory, each with its front."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.6), sharey=True, layout="constrained")
    costs = (("step time", "step_ms_median", 1.0, "step time, ms"), ("peak memory", "peak_bytes", 2**20, "peak, MiB"))
    for axis, (name, key, unit, title) in zip(axes, costs, strict=True):
        front = views.front("accuracy", name)
        points = {arm: _point(views, arm, key, unit) for arm in views.study.arms if arm != AGAIN}
        for arm, (x, dx, y, dy) in points.items():
            best = arm in front
            colour = BLUE if best else GREY
            axis.errorbar(x, y, dy, dx, color=colour, linewidth=0.6, alpha=0.8 if best else 0.35)
            marker = "s" if arm == BASELINE else "o"
            axis.plot(x, y, marker, color=colour, markerfacecolor=colour if best else "white", markersize=6)
            if best or arm == BASELINE:
                axis.annotate(arm, (x, y), (5, 6), textcoords="offset points", fontsize=8)
        steps = sorted((points[arm][0], points[arm][2]) for arm in front)
        axis.plot(*zip(*steps, strict=True), color=BLUE, linewidth=0.8, alpha=0.6)
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
        axis.margins(x=0.12)
    axes[0].set_ylabel("validation accuracy after the last epoch, %")
    save(figure, path)


def _point(views: Views, arm: str, key: str, unit: float) -> tuple[float, float, float, float]:
    """Mean and deviation over seeds, of a cost and of the accuracy in percent."""
    cells = views.study.arms[arm]
    cost = [cell.result[key] / unit for cell in cells]
    accuracy = [100 * cell.result["final_val_accuracy"] for cell in cells]
    return float(np.mean(cost)), _deviation(cost), float(np.mean(accuracy)), _deviation(accuracy)


def _deviation(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def interactions(views: Views, response: Response, path: Path) -> None:
    """A panel a pair of factors: means of the response over all arms with each two of their levels."""
    plt = pyplot()
    design = views.effects[response.name].design
    pairs = [p for p in combinations(design.factors, 2) if any({a, b} == set(p) for (a, _), (b, _) in design.pairs)]
    columns = min(3, len(pairs))
    lines = -(-len(pairs) // columns)
    size = (4.2 * columns, 3.0 * lines + 0.3)
    figure, axes = plt.subplots(lines, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, (first, second) in zip(axes.flat, pairs, strict=False):
        names = design.factors[first]
        for i, ((colour, marker, style), level) in enumerate(zip(_LINES, design.factors[second], strict=False)):
            points = [_over_seeds(views, response, {first: name, second: level}) for name in names]
            at = [k for k, point in enumerate(points) if point is not None]
            mean, deviation = np.array([points[k] for k in at]).T
            axis.errorbar(
                np.array(at) + 0.05 * i,
                mean,
                deviation,
                color=colour,
                marker=marker,
                linestyle=style,
                capsize=2,
                label=f"{second} {level}",
            )
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
    titles = {"accuracy": "accuracy, %", "step time": "step time, ms", "peak memory": "peak, MiB"}
    figure.supylabel(titles[response.name], fontsize=10)
    save(figure, path)


_UNITS: dict[str, Callable[[Any], Any]] = {
    "accuracy": lambda x: 100 * x,
    "step time": np.exp,
    "peak memory": lambda x: np.exp(x) / 2**20,
}


def _over_seeds(views: Views, response: Response, at: dict[str, str]) -> tuple[float, float] | None:
    """Mean and deviation over seeds of the mean over the factorial's arms with these levels; None without any."""
    design, table = views.effects[response.name].design, views.tables[response.name]
    arms = [arm for arm in design.arms if all(levels(arm).get(f, "off") == lv for f, lv in at.items())]
    by_seed = [
        _UNITS[response.name](np.mean([table[arm, seed].mean() for arm in arms if (arm, seed) in table]))
        for seed in views.study.seeds
        if any((arm, seed) in table for arm in arms)
    ]
    return (float(np.mean(by_seed)), _deviation(by_seed)) if by_seed else None


def half_normal(views: Views, judged: list[Response], path: Path) -> None:
    """A panel a response: sizes of the standardised contrasts against half-normal quantiles."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(judged), figsize=(4.6 * len(judged), 4.4), squeeze=False, layout="constrained")
    for axis, response in zip(axes.flat, judged, strict=True):
        noise = views.noise[response.name]
        assert noise is not None
        ordered = sorted((abs(size), name) for name, size in noise.contrasts.items())
        quantiles = stats.halfnorm.ppf((np.arange(len(ordered)) + 0.5) / len(ordered))
        margin = noise.estimate(0.0, 1.0).interval()[1]
        for x, (size, name) in zip(quantiles, ordered, strict=True):
            axis.plot(x, size, "o", color=BLUE, markerfacecolor=BLUE if size > margin else "white")
            if size > margin:
                axis.annotate(name, (x, size), (-5, 0), textcoords="offset points", ha="right", fontsize=7)
        axis.plot([0, quantiles[-1]], [0, quantiles[-1] * noise.deviation], color=GREY, linewidth=0.8)
        axis.axhline(margin, color=GREY, linewidth=0.8, linestyle="--")
        axis.set_title(response.name)
        axis.set_xlabel("half-normal quantile")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("size of the contrast")
    save(figure, path)
