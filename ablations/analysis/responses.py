"""The quantities that arms are compared in."""

from collections.abc import Callable, Mapping
from itertools import accumulate
from math import exp, log
from typing import NamedTuple

import numpy as np

from ablations.analysis.estimates import Estimator, Values, exact, moderated, winsorized
from ablations.analysis.timing import Timing
from ablations.study.arms import AGAIN, BASELINE, twin
from ablations.study.outcomes import Cell
from ablations.study.reading import Study

Table = Mapping[
    tuple[str, int], Values
]  # (arm, seed) -> the correctness of every validation image [I], or a number [1]


class Response(NamedTuple):
    """values: of a cell, [images] or [1]. shown: a difference in points or percent. better: 1 if more is better, else
    -1. estimator: how differences become estimates. learned: whether it is of what was learned, which exact
    optimizations leave as it is."""

    name: str
    values: Callable[[Cell], Values]
    shown: Callable[[float], float]
    better: int
    estimator: Estimator
    learned: bool = False


def _number(key: str, of: Callable[[float], float] = float) -> Callable[[Cell], Values]:
    return lambda cell: np.array([of(cell.result[key])])


def _percent(ratio: float) -> float:
    return 100 * (exp(ratio) - 1) if ratio < 700 else np.inf


RESPONSES = (
    Response("accuracy", lambda cell: cell.correct[-1].astype(float), lambda x: 100 * x, 1, moderated, True),
    Response("loss", _number("final_val_loss"), float, -1, moderated, True),
    Response("step time", _number("step_ms_median", log), _percent, -1, winsorized),
    Response("peak memory", _number("peak_bytes", log), _percent, -1, exact),
)
BY_NAME = {response.name: response for response in RESPONSES}
COMPARED = ("accuracy", "step time", "peak memory")  # in words, and between single arms


def tables(study: Study, timing: Timing | None, twins: Mapping[str, str]) -> dict[str, Table]:
    """Of each response: (arm, seed) -> values. What was learned is that of the arm's twin where this has the seed. Step
    time is of the timing pass, by round: the cells' own, minutes apart, are not compared. Peak memory is one number an
    arm: the greatest of its seeds.

    Accuracy is of every validation image; where seeds hold out others, nan for those of other seeds.
    """
    cells = {cell.key: cell for cell in study.cells}
    sizes = {cell.result.get("held_out"): cell.correct.shape[1] for cell in study.cells}
    begins = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))

    def values(response: Response, cell: Cell) -> Values:
        y, begin = response.values(cell), begins[cell.result.get("held_out")]
        if response.name != "accuracy":
            return y
        row = np.full(sum(sizes.values()), np.nan)
        row[begin : begin + len(y)] = y
        return row

    out: dict[str, Table] = {}
    for response in RESPONSES:
        if response.learned:
            own = {key: values(response, cell) for key, cell in cells.items()}
            keys = ((arm, seed) for arm in study.arms for seed in study.seeds)
            seen = {key: own.get((twins[key[0]], key[1]), own.get(key)) for key in keys}
            out[response.name] = {key: y for key, y in seen.items() if y is not None}
        elif response.name == "peak memory":
            peaks = {arm: max(response.values(cell)[0] for cell in group) for arm, group in study.arms.items()}
            out[response.name] = {(arm, 0): np.array([peak]) for arm, peak in peaks.items()}
        else:
            out[response.name] = {} if timing is None else timing.table
    return out


def twins_of(study: Study, baseline_differs: bool) -> dict[str, str]:
    """Of each arm the one whose accuracy is taken for its own: its twin where this is in the study and of the same
    model, else itself."""
    there = {arm for arm in study.arms if not (baseline_differs and arm == BASELINE)}
    return {arm: twin(arm) if arm != AGAIN and twin(arm) in there else arm for arm in study.arms}
