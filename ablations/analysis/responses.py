"""The quantities that arms are compared in."""

from collections.abc import Callable, Mapping
from math import exp, log
from typing import NamedTuple

import numpy as np

from ablations.analysis.estimates import Values
from ablations.study.reading import Cell, Study

Table = Mapping[
    tuple[str, int], Values
]  # (arm, seed) -> the correctness of every validation image [I], or a number [1]


class Response(NamedTuple):
    """values: of a cell, [images] or [1]. shown, unit: a difference as it is told. better: 1 if more is better, else
    -1."""

    name: str
    unit: str
    values: Callable[[Cell], Values]
    shown: Callable[[float], float]
    better: int


def _number(key: str, of: Callable[[float], float] = float) -> Callable[[Cell], Values]:
    return lambda cell: np.array([of(cell.result[key])])


def _percent(ratio: float) -> float:
    return 100 * (exp(ratio) - 1) if ratio < 700 else np.inf


RESPONSES = (
    Response("accuracy", "points", lambda cell: cell.correct[-1].astype(float), lambda x: 100 * x, 1),
    Response("loss", "", _number("final_val_loss"), float, -1),
    Response("step time", "%", _number("step_ms_median", log), _percent, -1),
    Response("peak memory", "%", _number("peak_bytes", log), _percent, -1),
)
BY_NAME = {response.name: response for response in RESPONSES}
COMPARED = ("accuracy", "step time", "peak memory")  # in words, and between single arms


def tables(study: Study) -> dict[str, Table]:
    """Of each response: (arm, seed) -> values."""
    return {r.name: {cell.key: r.values(cell) for cell in study.cells} for r in RESPONSES}
