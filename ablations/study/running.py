"""Runs a study: prepares its arms, refuses what cannot run before anything is written, trains, and profiles."""

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from ablations.study import initialization, profiling
from ablations.study.arms import read_settings, select, twin
from ablations.study.cells import Prepared, Progress, prepared, train
from ablations.study.evaluation import describe
from ablations.study.machine import ready
from ablations.study.recipes import Recipe
from ablations.study.recorder import Recorder
from ablations.study.store import Result, cell_folder, finished, profile_folder, write_json
from ablations.study.timing import ceiling
from core import rng
from core.data import sets
from core.data.splits import Data
from core.transforms.registry import REGISTRY
from core.weights import checkpoints


class Study(NamedTuple):
    """A study that can run: its arms, the resolved recipe, why it is that engine, the data, and which arms are left out
    and why."""

    cells: list[Prepared]
    recipe: Recipe
    why: str
    data: Data
    refused: dict[str, str]

    def planned(self, seeds: Sequence[int], every_arm: bool = False) -> list[tuple[Prepared, int]]:
        """Cells (arm, seed), seed by seed so that arms are met alike. What an arm learns that differs from another by
        exact optimizations alone is known from that one: it is trained at the first seed only, to show it."""
        names = {cell.arm.name for cell in self.cells}
        alone = {
            cell.arm.name
            for cell in self.cells
            if twin(cell.arm.name) in names - {cell.arm.name} and cell.plain == self._of(twin(cell.arm.name)).plain
        }
        return [
            (cell, seed)
            for seed in seeds
            for cell in self.cells
            if every_arm or seed == seeds[0] or cell.arm.name not in alone
        ]

    def _of(self, name: str) -> Prepared:
        return next(cell for cell in self.cells if cell.arm.name == name)


def foresee(arms: str, recipe: Recipe, root: Path, present: bool = True) -> Study:
    """A study without its images, where these are known beforehand, and without pretrained weights: nothing is
    fetched. InputError for whatever of it cannot be.

    present: whether the device must be here.
    """
    recipe = recipe.resolve_machine(present)
    select(arms, read_settings(recipe.set), recipe.weights is not None)  # refused before a folder is read
    data = sets.outline(recipe.data, root, recipe.image)
    recipe = recipe.resolve_data(data)
    chosen, refused = select(arms, read_settings(recipe.set), recipe.weights is not None)
    cells = [prepared(arm, recipe, data) for arm in chosen]
    recipe, why = recipe.resolve_engine(data)
    return Study([replace(cell, recipe=recipe) for cell in cells], recipe, why, data, refused)


def prepare(arms: str, recipe: Recipe, root: Path) -> Study:
    """The study that these make, its data at hand; InputError for whatever cannot run, cheap refusals first."""
    foreseen = foresee(arms, recipe, root)
    resolved = initialization.resolve(foreseen.recipe)
    device = ready(resolved.device)
    data = initialization.normalise(resolved, sets.load(recipe.data, root, recipe.image)).to(device)
    cells = [prepared(cell.arm, resolved, data) for cell in foreseen.cells]
    for cell in cells:
        cell.check()
    return foreseen._replace(cells=cells, recipe=resolved, data=data)


def run(cells: Sequence[tuple[Prepared, int]], preset: str, out: Path, progress: Progress) -> int:
    """Train every (arm, seed) that has no result yet; returns how many failed."""
    failed = 0
    for cell, seed in cells:
        folder = cell_folder(out, cell.arm.name, seed)
        if finished(folder):
            continue
        recorder = Recorder(folder)
        about: Result = {"arm": cell.arm.name, "seed": seed}
        try:
            result, best = train(cell, seed, recorder, progress)
            result["mfu"] = cell.plain_flops * 1000 / result["step_ms_median"] / ceiling(out, cell)
            result = {**about, "preset": preset, "data": cell.data.name, **result}
            checkpoints.save(folder / "best.safetensors", best, _describe(cell, seed, result))
            recorder.finish(result, _settings(cell, seed, preset))
            progress.done(result)
        except Exception as error:  # recorded and counted; the other cells go on
            recorder.fail(about | _failure(error))
            progress.done(about | _failure(error))
            failed += 1
    return failed


def until(
    decided: Callable[[], bool], seeds: Sequence[int], minutes: float, one: Callable[[int], int]
) -> tuple[int, int, str]:
    """Train seed by seed (`one`: a seed -> how many of its cells failed) until all is decided, which is asked from the
    second seed on, or the time is over before another seed as long as the last; returns how many seeds were trained,
    how many cells failed, and why no more."""
    begin, failed = time.monotonic(), 0
    for count, seed in enumerate(seeds, start=1):
        before = time.monotonic()
        failed += one(seed)
        now = time.monotonic()
        if count > 1 and decided():
            return count, failed, "all is decided"
        if now - begin + (now - before) > 60 * minutes:
            return count, failed, f"another seed would take longer than {minutes:g} minutes in all"
    return len(seeds), failed, "not all is decided, and these were all seeds"


def profile(study: Study, out: Path, progress: Progress) -> int:
    """A pass of its own over each arm's step (see profiling.py), where there is none yet; returns how many failed. Of
    the engine graphed it shows the compiled step that the graph replays."""
    failed = 0
    for cell in study.cells:
        name = cell.arm.name
        folder = profile_folder(out, name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "failed.json").unlink(missing_ok=True)
        try:
            if not (folder / "profile.json").is_file():
                state = cell.start(0, rng.key(0, cell.device))
                profiling.profile(cell.step, state, cell.batch(cell.recipe.batch_size), folder, name)
            progress.note(f"profile of {name}: {folder / 'profile.json'}")
        except Exception as error:  # recorded and counted; the other arms go on
            failed += 1
            write_json(folder / "failed.json", {"arm": name, **_failure(error)})
            progress.note(f"profile of {name}: failed: {_failure(error)['error']}")
    return failed


def _failure(error: Exception) -> Result:
    return {"error": f"{type(error).__name__}: {error}", "traceback": "".join(traceback.format_exception(error))}


def _describe(cell: Prepared, seed: int, result: Result) -> Result:
    return describe(cell.arm, seed, cell.config, cell.recipe, cell.data, result["best_val_accuracy"])


def _settings(cell: Prepared, seed: int, preset: str) -> dict[str, str | int | float | bool]:
    """What HParams shows: the arm, each optimization (off, on or its value in the arm's name), and the recipe."""
    parts = {base: value or "on" for base, _, value in (part.partition("@") for part in cell.arm.name.split("+"))}
    present = {name: parts.get(name, "off") for name in REGISTRY}
    terms = {f"recipe/{k}": v for k, v in asdict(cell.recipe).items() if isinstance(v, bool | int | float | str)}
    return {"arm": cell.arm.name, **present, "seed": seed, "recipe/preset": preset, **terms}
