"""A study read back from its folder, or several as one: cells, what failed, what is damaged, the timing pass."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

from ablations.study import belonging, identity, outcomes, profiling, schema
from ablations.study.arms import AGAIN, BASELINE, optimizations
from ablations.study.machine import COMPARABLE
from ablations.study.outcomes import Cell
from ablations.study.schema import Damaged
from ablations.study.store import Result, differing, read_study
from core import plugins
from core.errors import InputError


@dataclass(frozen=True)
class Study:
    """One study, or several joined. damaged: what was left out, and why."""

    folders: tuple[Path, ...]
    configuration: dict[str, Any]
    environment: dict[str, str]
    cells: list[Cell]
    failed: list[Result]
    damaged: tuple[str, ...] = ()

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
    def changes(self) -> list[str]:
        """Cells of other code, data or weights than most, a line for each such identity."""
        return [
            f"{', '.join(f'`{arm}` seed {seed}' for arm, seed in (cell.key for cell in group))}: "
            + ", ".join(identity.differences(self.identity, group[0].result.get("identity")))
            for group in self._alike[1:]
        ]

    @property
    def identity(self) -> dict[str, Any] | None:
        """Of the code, data and weights that most cells were made by."""
        return self._alike[0][0].result.get("identity")

    @cached_property
    def _alike(self) -> list[list[Cell]]:
        """Cells by what made them, most first."""
        groups: dict[str, list[Cell]] = {}
        for cell in self.cells:
            groups.setdefault(repr(cell.result.get("identity")), []).append(cell)
        return sorted(groups.values(), key=len, reverse=True)


def results(out: Path) -> list[Result]:
    """The results of all finished cells, sorted by arm and seed; without the damaged ones."""
    return [cell.result for cell in _cells(out, [])]


def timing(out: Path) -> Result | None:
    """What the timing pass in a study's folder found; None without one. Damaged if it cannot be read, or is of other
    settings than study.json has."""
    path = out / "timing.json"
    if not os.path.lexists(path):
        return None
    found, settings = schema.read(path, schema.TimingFile), schema.settings(read_study(out))
    if found.get("settings", settings) != settings:
        raise Damaged(f"'{path}' was measured under other settings than study.json has")
    for arm in {arm for took in found["blocks"] for arm, _ in took}:
        outcomes.check_arm(path, arm)
    return found


def read(folders: Sequence[Path]) -> Study:
    """The studies in these folders as one, without what is damaged. Raises InputError if a folder holds no study or no
    cell has finished, and for several folders if their settings, machines, data or weights differ or if two have the
    same cell."""
    met: dict[tuple[str, str], int] = {}
    studies = [_read(folder, met) for folder in folders]
    first = studies[0]
    arms = [optimizations(outcome["arm"]) for s in studies for outcome in (*s.results, *s.failed)]
    if unknown := plugins.missing(list(chain(*arms)), first.configuration.get("plugin", ())):
        raise InputError(f"'{folders[0]}': {unknown}")
    damaged = tuple(text for study in studies for text in study.damaged)
    if not any(study.cells for study in studies):
        why = f" ({damaged[0]})" if damaged else ""
        names = " and ".join(f"'{folder}'" for folder in folders)
        raise InputError(f"{names}: no finished cell yet{why}; run ablations/run.py --out {folders[0]} again")
    for folder, other in zip(folders[1:], studies[1:], strict=True):
        before, after = (_comparable(study) for study in (first, other))
        if odd := differing(before, after):
            changes = ", ".join(f"{k} {_told(before, k)} and {_told(after, k)}" for k in odd)
            raise InputError(f"'{folders[0]}' and '{folder}' cannot be joined: {changes}; pass them one at a time")
    cells = _joined(studies)
    failed = [failure for study in studies for failure in study.failed if _key(failure) not in cells]
    ordered = [cells[key] for key in sorted(cells)]
    return Study(tuple(folders), first.configuration, first.environment, ordered, failed, damaged)


def _joined(studies: Sequence[Study]) -> dict[tuple[str, int], Cell]:
    """Their cells; InputError for one that two of them have."""
    cells: dict[tuple[str, int], Cell] = {}
    for study in studies:
        for cell in study.cells:
            if cell.key in cells:
                (arm, seed), of = cell.key, [found.folder.parents[2] for found in (cells[cell.key], cell)]
                raise InputError(
                    f"two of the studies have '{arm}' at seed {seed}, '{of[0]}' and '{of[1]}'; pass each once, and "
                    "train other seeds (run.py --first-seed)"
                )
            cells[cell.key] = cell
    return cells


def _comparable(study: Study) -> dict[str, Any]:
    """What studies must share to be joined: settings, machine, and what their cells, or without one they, say of data
    and weights."""
    said = filter(None, (cell.result.get("identity") for cell in study.cells))
    of: dict[str, Any] = next(said, {}) or read_study(study.folders[0]).get("identity") or {}
    same = {f"digest of {key}": of[key] for key in ("data", "weights") if key in of}
    return schema.whole(study.configuration) | {k: study.environment[k] for k in COMPARABLE} | same


def _told(of: dict[str, Any], key: str) -> str:
    return repr(of[key]) if key in of else "unknown"


def _read(folder: Path, met: dict[tuple[str, str], int]) -> Study:
    study = read_study(folder)
    damaged: list[str] = []
    cells = list(_of(study, list(_cells(folder, damaged)), damaged, met))
    failed = _failed(folder, damaged)
    damaged += _beside(folder)
    return Study((folder,), study["configuration"], study["environment"], cells, failed, tuple(damaged))


def _of(
    study: dict[str, Any], cells: Sequence[Cell], damaged: list[str], met: dict[tuple[str, str], int]
) -> Iterator[Cell]:
    """The cells that can be compared: of the study's settings, of the images that most were judged by, and each by its
    own seed, for what two seeds have alike to the last bit is one of them, copied. met: the seed of each arm and what
    it learned, of all studies that are joined."""
    images = {
        held_out: Counter(c.correct.shape[1] for c in cells if c.result.get("held_out") == held_out).most_common(1)
        for held_out in {cell.result.get("held_out") for cell in cells}
    }
    for cell in cells:
        count, usual = cell.correct.shape[1], images[cell.result.get("held_out")][0][0]
        odd = belonging.differences(study, cell.result)
        odd += [f"{count} validation images, not {usual}"] * (count != usual)
        arm, seed = cell.key
        learned = repr([row["val/loss"] for row in cell.rows]).encode() + cell.correct.tobytes()
        same = met.setdefault((arm, schema.digest(learned)), seed)
        odd += [f"it is seed {same}, copied"] * (same != seed)
        if not odd:
            yield cell
            continue
        damaged.append(
            f"'{cell.folder}' is not as study.json has it ({', '.join(odd)}); restore one of them, or remove the cell, "
            "and the same command trains it"
        )


def _cells(out: Path, damaged: list[str]) -> Iterator[Cell]:
    for path in _files(out, "result.json"):
        try:
            yield outcomes.read(path.parent)
        except Damaged as error:
            damaged.append(str(error))


def _failed(out: Path, damaged: list[str]) -> list[Result]:
    found = []
    for path in _files(out, "failed.json"):
        try:
            found.append(outcomes.own(path, schema.Failure))
        except Damaged as error:
            damaged.append(str(error))
    return found


def _beside(out: Path) -> Iterator[str]:
    """What is damaged of that which does not count, tokens and profiles; and folders that nobody may look into."""
    folders = (out / "cells", *sorted(out.glob("cells/*")), *sorted(out.glob("cells/*/seed*")))
    yield from (f"'{f}' cannot be read (permission denied)" for f in folders if os.path.isdir(f) and not _open(f))
    reads: list[Callable[[], object]] = [partial(outcomes.tokens, path) for path in _files(out, "tokens.npz")]
    reads += [partial(profiling.load, p.parent) for p in sorted(out.glob("cells/*/profile/profile.json"))]
    for read in reads:
        try:
            read()
        except Damaged as error:
            yield str(error)


def _open(folder: Path) -> bool:
    return os.access(folder, os.R_OK | os.X_OK)


def _files(out: Path, name: str) -> list[Path]:
    """This file of every cell that has it, sorted by arm and seed."""
    found = (path for path in out.glob(f"cells/*/seed*/{name}") if re.fullmatch(r"seed\d+", path.parent.name))
    return sorted(found, key=lambda path: (path.parent.parent.name, int(path.parent.name[4:])))


def _key(outcome: Result) -> tuple[str, int]:
    return outcome["arm"], outcome["seed"]
