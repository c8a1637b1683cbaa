"""A study whose cells are trained by processes elsewhere: what such a process is told, what it does, and the loop that
sends it out. The study's folder and its claims are the only coordination."""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console

from ablations.study import claims, machine, passes, running, snapshots, timing
from ablations.study.outcomes import finished
from ablations.study.progress import Terminal
from ablations.study.recipes import Recipe
from ablations.study.signals import Stop
from ablations.study.store import Result, cell_folder
from core.errors import InputError

Cell = tuple[str, int]  # arm and seed


@dataclass(frozen=True)
class Order:
    """What a process needs to know to work on a study. here: the folder that relative paths start from; threads: of
    its processor."""

    arms: str
    recipe: Recipe
    root: Path
    preset: str
    out: Path
    deterministic: bool
    accept_changes: bool
    threads: int
    here: Path


class Job(Protocol):
    """What was sent: `perform` somewhere, some time."""

    def done(self) -> bool:
        """Whether it has ended."""

    def result(self) -> str | None:
        """What `perform` returned; raises where that process died."""


Send = Callable[[Sequence[tuple[object, ...]]], Sequence[Job]]  # arguments of `perform` -> a job for each


def perform(order: Order, task: str, *about: str | int) -> str | None:
    """Do a task of TASKS in this process; returns why the study cannot go on: bad input, or a full disk."""
    stop = Stop()
    try:
        with stop.listening(), Terminal(Console(), bar=False) as progress:
            TASKS[task](_study(order), order, progress, stop, *about)
    except (InputError, OSError) as error:
        return str(error)
    except running.Poisoned:
        os._exit(1)  # the cell's failure is recorded; the next one gets a fresh process
    return None


@lru_cache(1)
def _study(order: Order) -> running.Study:
    os.chdir(order.here)
    if order.deterministic:
        machine.deterministic()
    torch.set_num_threads(order.threads)
    study = running.prepare(order.arms, order.recipe, order.root)
    return running.record(study, order.preset, order.out, order.deterministic, order.accept_changes)


def _open(study: running.Study, order: Order, progress: Terminal, stop: Stop) -> None:
    for cell in study.cells:
        timing.ceiling(order.out, cell)  # measured before others compute beside


def _train(study: running.Study, order: Order, progress: Terminal, stop: Stop, arm: str, seed: int) -> None:
    claims.wait(lambda: claims.holder(passes.timing_claim(order.out)))
    cell = next(cell for cell in study.cells if cell.arm.name == arm)
    running.run_cell(cell, seed, study.made_by, order.out, progress, stop)
    cell.release()


def _measure(
    study: running.Study, order: Order, progress: Terminal, stop: Stop, timing_only: bool, profiled: bool
) -> None:
    passes.measured(study.cells, study.made_by, order.out, progress, timing_only, profiled)


TASKS: dict[str, Callable[..., None]] = {"open": _open, "train": _train, "measure": _measure}


def run(cells: Sequence[Cell], order: Order, send: Send, progress: Terminal) -> int:
    """Have every cell trained that is not settled; returns how many failed, now or before. A cell whose process died is
    sent again, and goes on from its last snapshot. InputError for what none of them can run."""
    folders = {cell: cell_folder(order.out, *cell) for cell in cells}
    left = [cell for cell in cells if not running.settled(folders[cell])]
    sent: dict[Cell, Job] = {}
    deaths: Counter[tuple[Cell, int]] = Counter()
    while left:
        free = [cell for cell in left if cell not in sent and not claims.taken(folders[cell])]
        free = [cell for cell in free if not running.settled(folders[cell])]  # given back just now, with its result
        sent |= zip(free, send([(order, "train", *cell) for cell in free]), strict=True)
        time.sleep(claims.PAUSE)
        for cell in [cell for cell, job in sent.items() if job.done()]:
            if (death := _death(sent.pop(cell))) and not running.settled(folders[cell]):
                step = snapshots.reached(folders[cell])
                deaths[cell, step] += 1
                _bounded(deaths[cell, step], "{} seed {}".format(*cell), death)
                progress.note("{} seed {}: ".format(*cell) + f"its process ended at step {step} ({death}); sent again")
        for cell in filter(lambda cell: running.settled(folders[cell]), list(left)):
            left.remove(cell)
            with suppress(FileNotFoundError):  # --retry-failed elsewhere, just now
                progress.done(_outcome(folders[cell]))
    return sum(running.failed(folder) for folder in folders.values())


def one(send: Send, order: Order, task: str, *about: bool) -> None:
    """Have one other task done, again if its process dies."""
    deaths = 0
    while True:
        (job,) = send([(order, task, *about)])
        while not job.done():
            time.sleep(claims.PAUSE)
        if not (death := _death(job)):
            return
        deaths += 1
        _bounded(deaths, task, death)


def _death(job: Job) -> str:
    """Why the process of a job that ended died; empty if it did not. InputError for what it says is wrong."""
    try:
        wrong = job.result()
    except Exception as error:  # of the launcher: a lost machine, a killed process, what was raised there
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[-1]}"
    if wrong:
        raise InputError(wrong)
    return ""


def _bounded(deaths: int, what: str, death: str) -> None:
    """A cell that was claimed fails by itself after DEATHS; what dies before that would be sent for ever."""
    if deaths > running.DEATHS + 1:
        raise InputError(f"{what}: {deaths} processes died before it began; the last: {death}")


def _outcome(folder: Path) -> Result:
    outcome: Result = json.loads((folder / ("result.json" if finished(folder) else "failed.json")).read_text())
    return outcome
