"""Effects and interactions with their intervals, drawn."""

from math import isfinite
from pathlib import Path

import numpy as np

from ablations.analysis.comparisons import Comparisons
from ablations.analysis.responses import RESPONSES
from ablations.reporting.formatting import told
from ablations.reporting.plotting import BLUE, GREY, pyplot, save


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
