"""A study read back from its folders: finished cells, what failed, configuration and environment."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ablations.study.arms import AGAIN, BASELINE, optimizations
from ablations.study.machine import COMPARABLE
from ablations.study.store import ANEW, Result, Row, cell_folder, readable, refuse_old
from core import plugins
from core.errors import InputError


def results(out: Path) -> list[Result]:
    """The results of all finished cells, sorted by arm and seed."""
    return _all(out, "result.json")


def failures(out: Path) -> list[Result]:
    """What is recorded of the cells that failed last time."""
    return _all(out, "failed.json")


def _all(out: Path, name: str) -> list[Result]:
    return [json.loads(path.read_text()) for path in sorted(out.glob(f"cells/*/seed*/{name}"))]


def history(out: Path, result: Result) -> list[Row]:
    """A cell's metrics by epoch."""
    path = cell_folder(out, result["arm"], result["seed"]) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@dataclass(frozen=True)
class Cell:
    """One arm at one seed: its result, its metrics by epoch, its folder."""

    result: Result
    rows: list[Row]
    folder: Path

    @property
    def key(self) -> tuple[str, int]:
        """Arm and seed."""
        return self.result["arm"], self.result["seed"]

    @cached_property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each validation image was classified correctly after each epoch, [epochs, images]."""
        path = self.folder / "correct.npz"
        if not path.is_file():
            raise InputError(f"'{self.folder}' has no correct.npz; {ANEW}")
        with readable(path):
            return np.asarray(np.load(path)["correct"])


@dataclass(frozen=True)
class Study:
    """One study, or several joined."""

    folders: tuple[Path, ...]
    configuration: dict[str, Any]
    environment: dict[str, str]
    cells: list[Cell]
    failed: list[Result]

    @property
    def results(self) -> list[Result]:
        """The finished cells' results."""
        return [cell.result for cell in self.cells]

    @cached_property
    def arms(self) -> dict[str, list[Cell]]:
        """Cells by arm: the baseline, then by number of optimizations and name; its second run last."""
        names = {cell.key[0] for cell in self.cells}
        ordered = sorted(names, key=lambda name: (name != BASELINE, name == AGAIN, name.count("+"), name))
        return {name: [cell for cell in self.cells if cell.key[0] == name] for name in ordered}

    @property
    def seeds(self) -> list[int]:
        """All seeds, in order."""
        return sorted({seed for _, seed in (cell.key for cell in self.cells)})

    @property
    def missing(self) -> list[tuple[str, int]]:
        """Cells that would make every arm complete in every seed, and those that failed."""
        present = {cell.key for cell in self.cells}
        wanted = [(arm, seed) for arm in self.arms for seed in self.seeds]
        return list(dict.fromkeys(key for key in [*wanted, *map(_key, self.failed)] if key not in present))


def read(folders: Sequence[Path]) -> Study:
    """The studies in these folders as one. Raises InputError if a folder holds no study or no cell has finished, and
    for several folders if their settings or machines differ or if two have the same cell."""
    studies = [_read(folder) for folder in folders]
    first = studies[0]
    arms = [optimizations(outcome["arm"]) for s in studies for outcome in (*s.results, *s.failed)]
    if unknown := plugins.missing(list(chain(*arms)), first.configuration.get("plugin", ())):
        raise InputError(f"'{folders[0]}': {unknown}")
    for folder, other in zip(folders[1:], studies[1:], strict=True):
        before, after = (s.configuration | {k: s.environment[k] for k in COMPARABLE} for s in (first, other))
        if odd := [k for k in {**before, **after} if before.get(k) != after.get(k)]:
            changes = ", ".join(f"{k} {before.get(k)!r} and {after.get(k)!r}" for k in odd)
            raise InputError(f"'{folders[0]}' and '{folder}' cannot be joined: {changes}; pass them one at a time")
    cells = {cell.key: cell for study in studies for cell in study.cells}
    if len(cells) < sum(len(study.cells) for study in studies):
        arm, seed = next(k for k in cells if sum(k == cell.key for study in studies for cell in study.cells) > 1)
        raise InputError(f"two of the studies have '{arm}' at seed {seed}; train other seeds (run.py --first-seed)")
    if not cells:
        raise InputError(f"'{folders[0]}' has no finished cell yet; run ablations/run.py --out {folders[0]} again")
    failed = [failure for study in studies for failure in study.failed if _key(failure) not in cells]
    ordered = [cells[key] for key in sorted(cells)]
    return Study(tuple(folders), first.configuration, first.environment, ordered, failed)


def _read(folder: Path) -> Study:
    path = folder / "study.json"
    if not path.is_file():
        raise InputError(f"'{folder}' holds no study (no study.json); pass a folder that ablations/run.py wrote")
    refuse_old(folder)
    with readable(path):
        study = json.loads(path.read_text())
        configuration, environment = study["configuration"], study["environment"]
    with readable(folder / "cells/*/seed*/result.json"):
        finished, failed = results(folder), failures(folder)
        _ = [_key(outcome) for outcome in (*finished, *failed)]
    return Study((folder,), configuration, environment, [_cell(folder, result) for result in finished], failed)


def _cell(folder: Path, result: Result) -> Cell:
    at = cell_folder(folder, *_key(result))
    with readable(at / "metrics.jsonl"):
        rows = history(folder, result)
        if len(rows) != result["epochs"]:
            raise ValueError(f"{len(rows)} of {result['epochs']} epochs")
    return Cell(result, rows, at)


def _key(outcome: Result) -> tuple[str, int]:
    return outcome["arm"], outcome["seed"]
