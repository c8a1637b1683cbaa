"""Effects and interactions with their intervals, drawn."""

from math import isfinite, isnan
from pathlib import Path

import numpy as np
import pandas as pd

from ablations.analysis.comparisons import Comparisons
from ablations.analysis.responses import BY_NAME, COMPARED
from ablations.reporting.formatting import UNITS, interval, title, told
from ablations.reporting.plotting import BLUE, GREY, pyplot, save, tell

_INTERACTIONS = 6


def effects(comparisons: Comparisons, path: Path) -> None:
    """A panel a response that was measured: every main effect, and the largest interactions that are told from zero."""
    frame = comparisons.effect_table
    frame = frame[frame["response"].isin(COMPARED)]
    mains = frame.loc[frame["order"] == 1, "effect"].unique()
    names = [*mains, *_interactions(frame)]
    responses = [name for name in COMPARED if name in set(frame["response"])]
    size = (12, 1.4 + 0.34 * len(names))
    figure, axes = pyplot().subplots(1, len(responses), figsize=size, sharey=True, layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], responses, strict=True):
        response, ends = BY_NAME[name], [0.0]
        for row in frame[(frame["response"] == name) & frame["effect"].isin(names)].to_dict("records"):
            at, value = -names.index(row["effect"]), response.shown(row["estimate"])
            low, high = (response.shown(row[f"{end}_together"]) for end in ("low", "high"))
            if not isnan(low):
                axis.plot([low, high], [at, at], color=BLUE, linewidth=2.5, alpha=0.55)
            (mark,) = axis.plot(value, at, "o", color=BLUE, markerfacecolor=BLUE if told(row) else "white")
            tell(mark, f"{row['effect']}: {name} {interval(row)} {UNITS[name]}")
            single = (response.shown(row[end]) for end in ("low", "high"))
            ends += [x for x in (value, *single) if isfinite(x)]
        margin = 0.3 * (max(ends) - min(ends)) or 1.0
        axis.set_xlim(min(ends) - margin, max(ends) + margin)  # longer intervals run out of the panel
        axis.axvline(0, color=GREY, linewidth=0.8)
        if len(mains) < len(names):
            axis.axhline(0.5 - len(mains), color=GREY, linewidth=0.6, linestyle="--")
        axis.set_xlabel(title(name))
        axis.grid(axis="x", alpha=0.3)
    axes[0, 0].set_yticks(-np.arange(len(names)), names)
    save(figure, path)


def _interactions(frame: pd.DataFrame) -> list[str]:
    """The largest of accuracy, then of time, then of memory, each once."""
    clear = [row for row in frame[frame["order"] == 2].to_dict("records") if told(row)]
    clear.sort(key=lambda row: (COMPARED.index(row["response"]), -abs(row["estimate"])))
    return list(dict.fromkeys(row["effect"] for row in clear))[:_INTERACTIONS]
