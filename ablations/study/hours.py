"""How long a study takes, from the seconds of a step of every arm: run.py --plan --hours."""

import heapq
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from ablations.study import reading
from ablations.study.cells import Prepared
from ablations.study.running import Study
from core import measure, model, rng
from core.errors import InputError
from core.step import start

FORWARD = 1 / 3  # of a step's time an image: what evaluation takes, without the backward pass
STEPS = 5  # of a short measurement, beyond one to warm up


class Planned(NamedTuple):
    """A cell that is left to train: hours, each of `processes` devices."""

    arm: str
    seed: int
    hours: float


def step_seconds(study: Study, out: Path) -> tuple[dict[str, float], str]:
    """Seconds of a step by arm, and where they are from: the timing pass in the study's folder where it has all arms,
    else a few steps of each here and now, on the first images' shapes. InputError where several processes would have
    to take them."""
    names, why = [cell.arm.name for cell in study.cells], f"'{out}' has no timing pass of all arms"
    try:
        blocks = [block for took in (reading.timing(out) or {"blocks": []})["blocks"] for block in took]
    except InputError as error:
        blocks, why = [], str(error)
    if {arm for arm, _ in blocks} >= set(names):
        found = {name: median(seconds for arm, seconds in blocks if arm == name) for name in names}
        return found, f"the timing pass of {out}"
    if study.recipe.processes not in (None, 1):
        raise InputError(
            f"step times of {study.recipe.processes} processes are not known: {why}; run the study with --timing-only "
            "first, or leave out --parallel"
        )
    return {cell.arm.name: _measured(cell) for cell in study.cells}, f"{STEPS} steps of each, measured now: {why}"


def _measured(cell: Prepared) -> float:
    params = {name: p.to(cell.device) for name, p in model.init(cell.config, 0, cell.ops).items()}
    state = start(params, cell.optimizer, rng.key(0, cell.device), cell.ops)
    batch, seconds = cell.batch(cell.images), []
    for _ in range(1 + STEPS):
        begin = time.perf_counter()
        cell.step(state, batch)
        measure.synchronize(cell.device)
        seconds.append(time.perf_counter() - begin)
    return median(seconds[1:])


def cells(planned: Sequence[tuple[Prepared, int]], seconds: dict[str, float]) -> list[Planned]:
    """Hours of every cell: its steps, and an evaluation after each epoch; compiling and reading data are not in it."""
    out = []
    for cell, seed in planned:
        recipe, step = cell.recipe, seconds[cell.arm.name]
        evaluation = len(cell.data.val.labels) / recipe.batch_size * step * FORWARD
        out.append(Planned(cell.arm.name, seed, recipe.epochs * (cell.steps * step + evaluation) / 3600))
    return out


def wall(hours: Sequence[float], workers: int) -> float:
    """Hours until all cells are done by so many workers, each free one taking the longest that is left (Graham 1969: at
    most 4/3 of the least)."""
    ends = [0.0] * workers
    for length in sorted(hours, reverse=True):
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def summary(left: Sequence[Planned], processes: int) -> dict[str, Any]:
    """Cells, hours of devices, and the wall time of 1, 2, 4, … workers of `processes` devices each, until more of them
    help no more: one for every cell."""
    hours = [cell.hours for cell in left]
    counts = [1]
    while counts[-1] < len(hours):
        counts.append(min(2 * counts[-1], len(hours)))
    return {
        "cells": len(hours),
        "device_hours": sum(hours) * processes,
        "longest_cell_hours": max(hours, default=0.0),
        "wall_hours": {n * processes: wall(hours, n) for n in counts},
    }
