"""Runs a study: prepares its arms, refuses what cannot run before anything is written, and trains."""

import errno
import json
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ablations.study import claims, identity, initialization, passes, processes, schema, snapshots, store, timing
from ablations.study.arms import read_settings, select, twin
from ablations.study.cells import Prepared, prepared
from ablations.study.claims import Claim, Lost
from ablations.study.evaluation import describe
from ablations.study.machine import environment, ready
from ablations.study.outcomes import damage, failed, finished
from ablations.study.progress import Terminal
from ablations.study.recipes import Recipe
from ablations.study.recorder import Recorder
from ablations.study.signals import NUMBERS, Stop, Stopped
from ablations.study.snapshots import Snapshots
from ablations.study.store import Result, cell_folder, read_study, write_json
from ablations.study.training import tokens, train
from core import measure, model, plugins, process
from core.data import sets
from core.data.splits import Data
from core.foreign import sources
from core.transforms.registry import REGISTRY
from core.weights import checkpoints

DEATHS = 2  # of a cell's processes, without a snapshot in between, after which it counts as failed


class Died(Exception):
    """A cell's process ended without a word, again and again."""


class Unread(Exception):
    """What a cell wrote is not what was written."""


class Poisoned(Exception):
    """A device refuses all work in this process after an error of a cell."""


class Study(NamedTuple):
    """A study that can run: its arms, the resolved recipe, why it is that engine, the data, which arms are left out and
    why, and what every result says of how it was made (see `record`)."""

    cells: list[Prepared]
    recipe: Recipe
    why: str
    data: Data
    refused: dict[str, str]
    made_by: Result

    def planned(self, seeds: Sequence[int], every_arm: bool = False) -> list[tuple[Prepared, int]]:
        """Cells (arm, seed), seed by seed so that arms are met alike. What an arm learns that differs from another by
        exact optimizations alone is known from that one: it is trained at the first seed only, to show it."""
        cells = {cell.arm.name: cell for cell in self.cells}
        twins = {name: cells.get(twin(name)) for name in cells}
        alone = {name for name, of in twins.items() if of and of is not cells[name] and of.plain == cells[name].plain}
        return [
            (cell, seed)
            for seed in seeds
            for cell in self.cells
            if every_arm or seed == seeds[0] or cell.arm.name not in alone
        ]


def foresee(arms: str, recipe: Recipe, root: Path, present: bool = True) -> Study:
    """A study without its images, where these are known beforehand, and without pretrained weights: nothing is
    fetched. InputError for whatever of it cannot be.

    present: whether the device must be here.
    """
    recipe = recipe.resolve_machine(present)
    plugins.load(recipe.plugin)
    pretrained = recipe.weights is not None or (recipe.model is not None and sources.pretrained(recipe.model))
    select(arms, read_settings(recipe.set), pretrained)  # refused before a folder is read
    data = sets.outline(recipe.data, root, recipe.image)
    recipe = recipe.resolve_data(data)
    chosen, refused = select(arms, read_settings(recipe.set), pretrained, lambda arm: prepared(arm, recipe, data))
    cells = [prepared(arm, recipe, data) for arm in chosen]
    recipe, why = recipe.resolve_engine(data)
    return Study([replace(cell, recipe=recipe) for cell in cells], recipe, why, data, refused, {})


def prepare(arms: str, recipe: Recipe, root: Path) -> Study:
    """The study that these make, its data at hand; InputError for whatever cannot run, cheap refusals first."""
    foreseen = foresee(arms, recipe, root)
    for cell in foreseen.cells:
        cell.need_memory()
    resolved = initialization.resolve(foreseen.recipe)
    device = ready(resolved.device)
    data = initialization.normalise(resolved, sets.load(recipe.data, root, recipe.image)).to(device)
    cells = [prepared(cell.arm, resolved, data) for cell in foreseen.cells]
    for cell in cells:
        cell.check()
    return foreseen._replace(cells=cells, recipe=resolved, data=data)


def configuration(study: Study, preset: str, deterministic: bool) -> dict[str, Any]:
    """The settings of a study, as study.json has them."""
    settings = {"preset": preset, **asdict(study.recipe)} | ({"deterministic": True} if deterministic else {})
    return dict(json.loads(json.dumps(settings)))


def refuse_other_settings(study: Study, preset: str, out: Path, deterministic: bool) -> None:
    """InputError for another study's folder, as far as its settings tell: nothing is fetched or written."""
    if not (out / "study.json").is_file():
        return
    before = schema.whole(read_study(out)["configuration"])
    settings = configuration(study, preset, deterministic)
    if study.recipe.weights and study.recipe.eps is None:  # as they have it
        settings["eps"] = before.get("eps")
    store.refuse_other(out, before, settings)


def record(study: Study, preset: str, out: Path, deterministic: bool, accept_changes: bool) -> Study:
    """Make the study's folder, or continue it; returns the study with what its cells are made by, whatever study.json
    says later (--accept-changes elsewhere). InputError if the folder is another study's."""
    settings, recipe = configuration(study, preset, deterministic), study.recipe
    made_by = identity.of(study.data, recipe.weights, study.cells[0].config, recipe.files)
    with store.changing(out):  # two first starts at once
        made = {"configuration": settings, "environment": environment(recipe.device), "identity": made_by}
        parameters = {cell.arm.name: model.parameters(cell.config, cell.ops) for cell in study.cells}
        store.open_study(out, made | {"parts": study.data.parts, "parameters": parameters}, accept_changes)
        digest = schema.settings(read_study(out))
    return study._replace(made_by={"preset": preset, "identity": made_by, "settings": digest})


@measure.unsearched()
def run(cells: Sequence[tuple[Prepared, int]], made_by: Result, out: Path, progress: Terminal, stop: Stop) -> int:
    """Train every (arm, seed) that has neither result nor failure and that no other process has, then wait for those
    that others have; returns how many failed, now or before. made_by: what every result says of how it was made.

    Raises OSError if the disk is full, and Poisoned after a failure that this process cannot go on after.
    """
    out = out.absolute()  # an arm's code may change the folder
    folders = {(cell, seed): cell_folder(out, cell.arm.name, seed) for cell, seed in cells}
    waiting = 0
    while True:
        stop.check()  # told while a cell ended otherwise
        left = [key for key, folder in folders.items() if not settled(folder)]
        for cell in {cell for cell, _ in cells} - {cell for cell, _ in left}:
            cell.release()
        if not left:
            for folder in filter(finished, folders.values()):  # a process may have been killed just then
                Snapshots(folder, {}, progress.note).remove()
                claims.clear(folder)
            return sum(failed(folder) for folder in folders.values())
        read_study(out)  # InputError for one that is gone: nothing is trained for hours that no result could be of
        left.sort(key=lambda key: (key[1], not key[0].met))  # processes divide arms, whose preparation costs a second
        for cell, seed in left:
            if run_cell(cell, seed, made_by, out, progress, stop):
                break
        else:
            if len(left) != waiting:
                waiting = len(left)
                held = filter(None, map(claims.holder, (passes.timing_claim(out), *(folders[key] for key in left))))
                of = next((f"; {claims.described(path)}" for path in held), "")
                progress.note(f"waiting for {waiting} cells of other processes{of}")
            time.sleep(claims.PAUSE)


def run_cell(cell: Prepared, seed: int, made_by: Result, out: Path, progress: Terminal, stop: Stop) -> bool:
    """Train a cell, from its last snapshot, unless it is settled, another process has it, or one has this machine to
    itself; returns whether it was this process's."""
    folder = cell_folder(out, cell.arm.name, seed)
    with claims.claimed(folder, snapshots.reached(folder)) as claim:
        if claim is None or claims.taken(passes.timing_claim(out)) or settled(folder):
            return False
        _attempt(cell, seed, made_by, out, progress, stop, claim)
    return True


def follow(study: Study) -> None:
    """Train and time with the leader what it says, until it says that there is nothing left. Whoever tells processes to
    end tells the leader too."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)
    cells, unheard = {cell.arm.name: cell for cell in study.cells}, processes.UNHEARD
    while order := processes.told():
        what, *about = order
        if what == "train":
            name, seed = about
            with suppress(FloatingPointError, Stopped):  # the leader records the one, and ends by the other
                train(cells[name], seed, unheard, unheard, unheard, Stop())
        else:
            timing.rounds(study.cells, about[0], unheard)


def settled(folder: Path) -> bool:
    """Whether a cell is not to be trained: it has a result or a failure."""
    return finished(folder) or failed(folder)


@process.as_it_was()
def _attempt(
    cell: Prepared, seed: int, made_by: Result, out: Path, progress: Terminal, stop: Stop, claim: Claim
) -> None:
    """Train a cell that is this process's; its result or its failure is recorded and shown."""
    folder = cell_folder(out, cell.arm.name, seed)
    about: Result = {"arm": cell.arm.name, "seed": seed}
    try:
        if claim.died >= DEATHS:
            raise Died(f"its process died {claim.died} times at step {snapshots.reached(folder)}, without a message")
        kept = Snapshots(folder, {**about, "settings": made_by["settings"], **made_by["identity"]}, progress.note)
        ceiling = timing.ceiling(out, cell)  # a study.json that is gone is told before hours of training
        with closing(Recorder(folder)) as recorder:
            result, best = train(cell, seed, recorder, progress, kept, stop, claim.check)
            result["mfu"] = cell.plain_flops * 1000 / result["step_ms_median"] / ceiling
            result = {**about, "data": cell.data.name, **made_by, **result}
            told = describe(cell.arm, seed, cell.config, cell.recipe, cell.data, result["best_val_accuracy"])
            told |= {"identity": made_by["identity"]}
            checkpoints.save(folder / "best.safetensors", model.state_dict(cell.config, best), told)
            if cut := tokens(cell.holding_out(seed)):
                store.write_tokens(folder, *cut)
            recorder.finish(result, _settings(cell, seed, made_by["preset"]))
        if why := damage(folder):  # it would be trained again without end
            raise Unread(f"its result cannot be read back: {why}")
        kept.remove()
        progress.done(result)
        return
    except Lost as error:
        progress.note(str(error))
        processes.leave_after(error)
        return
    except (Exception, SystemExit) as error:  # recorded; the other cells go on
        if processes.lost(error):
            claim.leave()
            processes.leave_after(error)
        if passes.full(error):
            raise OSError(errno.ENOSPC, "no space left; free some, and the same command continues", str(out)) from error
        failure, cause = about | passes.failure(error), error
    read_study(out)  # of one that is gone it is no failure of the cell
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "failed.json", failure)
    progress.done(failure)
    cell.release()
    if not isinstance(cause, FloatingPointError):  # that is the same in all
        processes.leave_after(cause)
    if not _usable(cell.device):
        raise Poisoned(failure["error"])


def _usable(device: torch.device) -> bool:
    """Whether a device still works in this process: some CUDA errors stay."""
    try:
        measure.synchronize(device)
    except RuntimeError:
        return False
    return True


def until(
    decided: Callable[[int], bool], seeds: Sequence[int], minutes: float, one: Callable[[int], int]
) -> tuple[int, int, str]:
    """Train seed by seed (`one`: a seed -> how many of its cells failed) until all is decided after so many of them,
    which is asked from the second on, or the time is over before another seed as long as the last; returns how many
    seeds were trained, how many cells failed, and why no more."""
    begin, failed = time.monotonic(), 0
    for count, seed in enumerate(seeds, start=1):
        before = time.monotonic()
        failed += one(seed)
        now = time.monotonic()
        if count > 1 and decided(count):
            return count, failed, "all is decided"
        if now - begin + (now - before) > 60 * minutes:
            return count, failed, f"another seed would take longer than {minutes:g} minutes in all"
    return len(seeds), failed, "not all is decided, and these were all seeds"


def need(cells: Sequence[tuple[Prepared, int]]) -> int:
    """Bytes that these cells write, about: the best weights of each, and snapshots of the largest."""
    sizes = [4 * model.parameters(cell.config, cell.ops) for cell, _ in cells]
    copies = max((4 if cell.recipe.ema is None else 5 for cell, _ in cells), default=0)
    return sum(sizes) + 3 * copies * max(sizes, default=0)


def _settings(cell: Prepared, seed: int, preset: str) -> dict[str, str | int | float | bool]:
    """What HParams shows: the arm, each optimization (off, on or its value in the arm's name), and the recipe."""
    parts = {base: value or "on" for base, _, value in (part.partition("@") for part in cell.arm.name.split("+"))}
    present = {name: parts.get(name, "off") for name in REGISTRY}
    terms = {f"recipe/{k}": v for k, v in asdict(cell.recipe).items() if isinstance(v, bool | int | float | str)}
    return {"arm": cell.arm.name, **present, "seed": seed, "recipe/preset": preset, **terms}
