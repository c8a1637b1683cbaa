"""The timing pass: the step time of every arm, measured side by side in rounds of freshly shuffled order.

The cells' own step times are minutes apart, in a fixed order: position and arm are confounded. Here every round has a
block of steps of every arm, and of the baseline a second time (A/A, which shows what is noise); an arm's ratio to the
baseline is taken within rounds.
"""

import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from ablations.study import processes, reading, schema
from ablations.study.arms import AGAIN, BASELINE, parse
from ablations.study.cells import Prepared, prepared
from ablations.study.progress import Terminal
from ablations.study.store import Result, changing, read_study, write_json
from core import measure, rng
from core.errors import InputError
from core.step import State

BLOCK, STEPS = 0.005, 1  # seconds and steps of a block, at least: short, for machines change speed within 0.1 s
WITHIN, QUIET = 0.015, 0.02  # half of an interval: of every arm, at which the pass ends; of A/A on a quiet machine
ROUNDS = 12  # at least
SHARE, MOST = 0.1, 300.0  # of the cells' training time, and seconds, that the pass takes at most beyond these


def complete(out: Path, cells: Sequence[Prepared]) -> bool:
    """Whether the study's pass has all of these arms, or what they failed by."""
    try:
        found = reading.timing(out) or {"ratios": {}}
    except schema.Damaged:  # measured anew
        return False
    return {cell.arm.name for cell in cells} <= {**found["ratios"], **found.get("failed", {})}.keys()


def forget_failures(out: Path) -> None:
    """Have arms that failed in the pass measured again."""
    if not (out / "timing.json").is_file():
        return
    with suppress(InputError), changing(out):
        if (found := reading.timing(out)) and found.get("failed"):
            write_json(out / "timing.json", found | {"failed": {}})


def measure_arms(cells: Sequence[Prepared], made_by: Result, out: Path, progress: Terminal, asked: bool = False) -> int:
    """Measure every arm, write timing.json, and return how many failed. InputError without a baseline: there is nothing
    to compare with.

    asked: by itself, and so for as long as it may take at most; else for a share of the training time.
    """
    baseline = next((cell for cell in cells if cell.arm.name == BASELINE), None)
    if baseline is None:
        raise InputError(f"a timing pass compares with the baseline; add it: --arms {BASELINE},…")
    load, begin, most = os.getloadavg()[0], time.perf_counter(), MOST if asked else _most(out)
    found, groups, failed = rounds(cells, most, progress)
    if not found:
        return len(failed)
    ratios = measure.ratios(found, BASELINE)
    ratio, low, high = ratios[AGAIN]
    quiet = bool(low > 1 - QUIET and high < 1 + QUIET)
    measured = {
        "baseline": BASELINE,
        "ratios": {name: dict(zip(("ratio", "low", "high"), of, strict=True)) for name, of in ratios.items()},
        "rounds": len(found),
        "groups": groups,
        "failed": failed,
        "quiet": quiet,
        "blocks": found,
        "wall_seconds": time.perf_counter() - begin,
        "load": {"before": load, "after": os.getloadavg()[0], "processors": os.cpu_count()},
        "gpu": measure.gpu_state(baseline.device),
        "ceiling": ceiling(out, baseline),
    }
    with changing(out):
        write_json(out / "timing.json", measured | made_by)
    noise = f"the baseline against itself {100 * (ratio - 1):+.1f} % [{100 * (low - 1):+.1f}, {100 * (high - 1):+.1f}]"
    odd = "" if quiet else "; the machine was not quiet: step times are less certain than they could be"
    took = time.perf_counter() - begin
    progress.note(f"timing pass: {len(ratios)} arms, {len(found)} rounds, {took:.0f} s; {noise}{odd}")
    return len(failed)


def rounds(
    cells: Sequence[Prepared], most: float, progress: Terminal
) -> tuple[list[measure.Round], int, dict[str, str]]:
    """The rounds of all groups, how many groups these are, and why arms are in none, in about `most` seconds. There are
    no rounds if the baseline fails."""
    processes.lead("time", most)
    baseline = next(cell for cell in cells if cell.arm.name == BASELINE)
    again = prepared(parse(AGAIN), baseline.recipe, baseline.data)
    others = [cell for cell in cells if cell.arm.name not in (BASELINE, AGAIN)]
    found: list[measure.Round] = []
    failed: dict[str, str] = {}
    groups = 0
    for group in _groups([baseline, again], others, failed):
        groups += 1
        found += _rounds(group, most * len(group) / (len(others) + 2), baseline.device)
    for name, why in failed.items():
        progress.note(f"timing pass: {name} {why}")
    return found, groups, failed


def ceiling(out: Path, cell: Prepared) -> float:
    """FLOP/s that MFU is a share of: measured once a study for every precision, and kept in study.json."""
    name = str(cell.dtype).removeprefix("torch.")
    if name not in read_study(out).get("ceiling", {}):
        with changing(out):
            study = read_study(out)
            known = study.get("ceiling", {})
            if name not in known:
                known[name] = measure.ceiling(cell.dtype, cell.device)
                write_json(out / "study.json", study | {"ceiling": known})
    return float(read_study(out)["ceiling"][name])


def _most(out: Path) -> float:
    """Seconds that the pass may take."""
    trained = sum(result["train_seconds"] for result in reading.results(out))
    return min(MOST, SHARE * trained)


def _groups(
    first: Sequence[Prepared], others: Sequence[Prepared], failed: dict[str, str]
) -> Iterator[dict[str, tuple[Callable[[], object], int]]]:
    """Every arm's block and its steps, warmed up: all at once where they fit the device's memory, else as many as fit
    at a time, always beside the baseline. failed: gets why an arm is in no group."""
    states: dict[Any, State] = {}
    left = list(others)
    while True:
        try:
            group = {cell.arm.name: _block(cell, states) for cell in first}
        except (Exception, SystemExit) as error:  # recorded; nothing can be compared
            failed[BASELINE] = f"failed: {type(error).__name__}: {error}"
            return
        held = list(first)
        while left:
            try:
                group[left[0].arm.name] = _block(left[0], states)
                held.append(left.pop(0))
            except torch.cuda.OutOfMemoryError as error:
                if len(group) > len(first):
                    break
                failed[left.pop(0).arm.name] = f"does not fit beside the baseline: {error}"
            except (Exception, SystemExit) as error:  # recorded; the other arms are measured
                failed[left.pop(0).arm.name] = f"failed: {type(error).__name__}: {error}"
        yield group
        if not left:
            return
        states.clear()
        for cell in [*held, left[0]]:
            vars(cell).pop("loop", None)
        gc.collect()
        torch.cuda.empty_cache()


def _block(cell: Prepared, states: dict[Any, State]) -> tuple[Callable[[], object], int]:
    """A block of an arm, long enough, and its number of steps. Arms of one shape start from one state."""
    state = cell.start(0, rng.key(0, cell.device))
    leaves, structure = tree_flatten(state)
    state = states.setdefault((str(structure), *(leaf.shape for leaf in leaves)), state)
    cell.loop.warm_up(state)
    seconds = processes.told(min(_timed(cell, state, STEPS) for _ in range(2))) / STEPS
    steps = max(STEPS, math.ceil(BLOCK / seconds))
    epochs = math.ceil(steps / cell.steps)
    each = math.ceil(steps / epochs)
    order = torch.arange(each * cell.recipe.batch_size, device=cell.data.train.labels.device)

    def run() -> None:
        for _ in range(epochs):
            cell.loop.epoch(state, order)

    run()
    return run, each * epochs


def _timed(cell: Prepared, state: State, steps: int) -> float:
    order = torch.arange(min(steps, cell.steps) * cell.recipe.batch_size, device=cell.data.train.labels.device)
    measure.synchronize(cell.device)
    begin = time.perf_counter()
    cell.loop.epoch(state, order)
    measure.synchronize(cell.device)
    return time.perf_counter() - begin


def _rounds(
    group: dict[str, tuple[Callable[[], object], int]], most: float, device: torch.device
) -> list[measure.Round]:
    """Rounds until every arm's ratio is known to WITHIN, and A/A's interval is within that of 1, or `most` seconds are
    over; at least ROUNDS.

    The baseline, which is in every ratio, has the root of the others' number of blocks a round (Dunnett, J. Am. Stat.
    Assoc. 50, 1955), and so has the baseline again.
    """
    end = time.perf_counter() + most
    often = max(1, round(math.sqrt(len(group) - 2)))
    blocks = [(name, run) for name, (run, _) in group.items() for _ in range(often if name in (BASELINE, AGAIN) else 1)]
    found: list[measure.Round] = []
    for took in measure.in_rounds(blocks, device):
        found.append([(name, seconds / group[name][1]) for name, seconds in took])
        if processes.told(len(found) >= ROUNDS and (time.perf_counter() >= end or _settled(found))):
            return found
    raise AssertionError("rounds have no end")


def _settled(rounds: Sequence[measure.Round]) -> bool:
    found = measure.ratios(rounds, BASELINE)
    _, low, high = found[AGAIN]
    known = all(high - low < 2 * WITHIN * ratio for ratio, low, high in found.values())
    return known and low > 1 - WITHIN and high < 1 + WITHIN
