"""Runs the cells of a study: every arm at every seed, all else held equal."""

import dataclasses
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ablations.reporting import profiles as profiling_views
from ablations.study import profiling
from ablations.study.arms import Arm
from ablations.study.evaluation import Evaluation, describe, evaluate, fetch
from ablations.study.initialization import initial
from ablations.study.plan import accounted, bytes_per_image
from ablations.study.recipes import Recipe
from ablations.study.store import Recorder, Result, Row, cell_folder, finished, write_json
from ablations.study.token_pictures import tokenized
from core import rng, vit
from core.data.splits import Data, Split
from core.engine import Loop, build, loop
from core.errors import InputError
from core.measure import Ticks, ceiling, gpu_state, peak_bytes, reserved_bytes, synchronize
from core.ops import Params
from core.step import Batch, Metrics, Prepare, State, Step, memory, objective, start
from core.transforms.registry import REGISTRY
from core.weights import checkpoints as weights


class Progress(Protocol):
    """Who watches a study."""

    def cell(self, arm: str, seed: int, steps: int) -> None:
        """A cell starts."""

    def step(self) -> None:
        """A training step was issued."""

    def epoch(self, row: Row) -> None:
        """An epoch was evaluated."""

    def done(self, outcome: Result) -> None:
        """The cell finished (its result) or failed (its error)."""

    def profiled(self, arm: str, outcome: str) -> None:
        """An arm's step was profiled (where that can be read), or not (why)."""


def check(arms: Sequence[Arm], recipe: Recipe, data: Data) -> None:
    """Refuse what cannot run before anything is written: the loss of each arm on two images."""
    device = torch.device(recipe.device)
    recipe.optimizer(len(data.train.labels) // recipe.batch_size)
    for arm in arms:
        config = recipe.model(arm, data)
        batch = fetch(data.train, torch.arange(min(2, len(data.train.labels))), device)
        try:
            loss = objective(config, arm.ops, recipe.prepare(data), recipe.dtype(arm))
            params = _to(initial(recipe, arm, data, 0), device) | memory(config, len(batch[0]), device)
            loss(params, batch, rng.key(0, device))
        except InputError as error:
            raise InputError(f"arm '{arm.name}': {error}") from error


def run(
    arms: Sequence[Arm], seeds: Sequence[int], preset: str, recipe: Recipe, data: Data, out: Path, progress: Progress
) -> int:
    """Train every cell that has no result yet, seed by seed so that arms are met alike; returns how many failed.

    An arm's seeds share its loop, so that only the first compiles.
    """
    data = data.to(torch.device(recipe.device))
    failed, loops = 0, dict[str, tuple[Step, Loop, Params]]()
    for seed in seeds:
        for arm in arms:
            folder = cell_folder(out, arm.name, seed)
            if finished(folder):
                continue
            recorder = Recorder(folder)
            try:
                if arm.name not in loops:
                    loops[arm.name] = _loop(arm, recipe, data)
                result, best = train(arm, seed, *loops[arm.name], recipe, data, recorder, progress)
                about = describe(arm, seed, recipe.model(arm, data), recipe, data, result["best_val_accuracy"])
                weights.save(folder / "best.safetensors", best, about)
                result = {"arm": arm.name, "seed": seed, "preset": preset, "data": data.name, **result}
                recorder.finish(result, _settings(arm, seed, preset, recipe))
                progress.done(result)
            except Exception as error:  # recorded and counted; the other cells go on
                recorder.fail(arm.name, seed, error, traceback.format_exc())
                progress.done({"arm": arm.name, "seed": seed, "error": f"{type(error).__name__}: {error}"})
                failed += 1
    return failed


def _loop(arm: Arm, recipe: Recipe, data: Data) -> tuple[Step, Loop, Params]:
    """An arm's step, the loop that runs it, and the gradient norms that the loop remembers."""
    device, config = torch.device(recipe.device), recipe.model(arm, data)
    loss = objective(config, arm.ops, recipe.prepare(data), recipe.dtype(arm))
    optimizer = recipe.optimizer(len(data.train.labels) // recipe.batch_size)
    step = build(loss, optimizer, recipe.engine, recipe.differentiator)
    norms = memory(config, len(data.train.labels), device) if arm.remembers else {}
    return step, loop(recipe.engine, step, data.train, recipe.batch_size, device, norms), norms


def profile(arms: Sequence[Arm], recipe: Recipe, data: Data, out: Path, progress: Progress) -> int:
    """A pass of its own over each arm's step (see profiling.py), where there is none yet, and the views of all;
    returns how many failed. Of the engine graphed it shows the compiled step that the graph replays."""
    device, folders, failed = torch.device(recipe.device), dict[str, Path](), 0
    data = data.to(device)
    for arm in arms:
        folder = out / arm.name / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "failed.json").unlink(missing_ok=True)
        try:
            if not (folder / "profile.json").is_file():
                step, _, norms = _loop(arm, recipe, data)
                state = start(_to(initial(recipe, arm, data, 0), device), rng.key(0, device))
                batch = _first_batch(data.train, norms, recipe.batch_size, device)
                profiling.profile(step, state, batch, folder, arm.name)
            folders[arm.name] = folder
            progress.profiled(arm.name, f"{folder / 'operations.md'}")
        except Exception as error:  # recorded and counted; the other arms go on
            failed += 1
            text = f"{type(error).__name__}: {error}"
            write_json(folder / "failed.json", {"arm": arm.name, "error": text, "traceback": traceback.format_exc()})
            progress.profiled(arm.name, f"failed: {text}")
    profiling_views.views(folders)
    return failed


def train(
    arm: Arm,
    seed: int,
    step: Step,
    steps: Loop,
    norms: Params,
    recipe: Recipe,
    data: Data,
    recorder: Recorder,
    progress: Progress,
) -> tuple[Result, Params]:
    """One cell: its result and the parameters with the best validation accuracy, by the arm's loop.

    Initial weights, data order and augmentation depend on the seed alone. Evaluation, logging, compilation and
    the memory pass are outside the training time. Raises FloatingPointError if the loss stops being finite.
    """
    device, config, ops = torch.device(recipe.device), recipe.model(arm, data), arm.ops
    dtype, prepare = recipe.dtype(arm), recipe.prepare(data)
    order_key, step_key = rng.split(rng.key(seed, device), 2)
    state = start(_to(initial(recipe, arm, data, seed), device), step_key)
    progress.cell(arm.name, seed, len(data.train.labels) // recipe.batch_size * recipe.epochs)
    for name, parameters in arm.parameters.items():
        if layout := REGISTRY[name].layout:
            recorder.picture("tokens", _tokenized(layout(**parameters), data, prepare, device))

    account = accounted(arm, config, recipe)
    warmup_seconds, peak, reserved = _warm_up(step, steps, state, data.train, norms, recipe.batch_size, device)
    history: list[Row] = []
    evaluations: list[Evaluation] = []
    intervals: list[float] = []
    best: tuple[float, Params] = (-1.0, state.params)
    for epoch in range(1, recipe.epochs + 1):
        order = rng.permutation(rng.fold_in(order_key, epoch), len(data.train.labels))
        ticks = Ticks(device)
        ticks.mark()

        def done(ticks: Ticks = ticks) -> None:
            ticks.mark()
            progress.step()

        state, metrics = steps.epoch(state, order, done)
        seconds = ticks.intervals()
        intervals += seconds
        evaluated = evaluate(state.params, data.val, config, ops, prepare, dtype, device)
        row = _row(epoch, metrics, seconds, recipe.batch_size) | {
            "val/accuracy": evaluated.accuracy,
            "val/loss": evaluated.loss,
            "memory/peak_mib": peak / 2**20,
            "seconds": sum(intervals),
        }
        history.append(row)
        evaluations.append(evaluated)
        recorder.epoch(row)
        progress.epoch(row)
        if not all(map(_finite, (row["train/loss"], row["val/loss"]))):
            raise FloatingPointError(f"loss is {row['train/loss']} (validation {evaluated.loss}) after epoch {epoch}")
        if evaluated.accuracy > best[0]:
            best = evaluated.accuracy, state.params
    recorder.correct(torch.stack([e.correct for e in evaluations]))
    result = {
        "parameters": vit.parameters(config),
        "epochs": recipe.epochs,
        "best_val_accuracy": best[0],
        "final_val_accuracy": evaluations[-1].accuracy,
        "final_val_loss": evaluations[-1].loss,
        "final_train_loss": history[-1]["train/loss"],
        "train_seconds": sum(intervals),
        "images_per_second": len(intervals) * recipe.batch_size / sum(intervals),
        "step_ms_median": median(intervals) * 1000,
        "peak_bytes": peak,
        "reserved_bytes": reserved,
        "predicted_peak_bytes": account.peak_bytes,
        "bytes_per_image": bytes_per_image(arm, config, recipe),
        "kept_bytes": account.kept_bytes,
        "flops_per_image": account.flops // recipe.batch_size,
        "mfu": account.flops / median(intervals) / ceiling(dtype, device),
        "gpu": gpu_state(device),
        "kept_by_op": account.kept_by_op,
        "warmup_seconds": warmup_seconds,
        "batch_size": recipe.batch_size,
        "engine": recipe.engine,
        "differentiator": recipe.differentiator,
        "device": recipe.device,
        "precision": arm.precision or recipe.precision,
        "torch": torch.__version__,
    }
    return result, best[1]


def _tokenized(
    layout: Callable[[Tensor], tuple[Tensor, Tensor]], data: Data, prepare: Prepare, device: torch.device
) -> Tensor:
    """A picture of how some validation images are cut into patches."""
    images = data.val.images[torch.linspace(0, len(data.val.labels) - 1, 6).long()].to(device)
    resized, selection = layout(prepare(images, None))
    pixels = F.interpolate(images.float(), resized.shape[-2:], mode="bilinear", align_corners=False)
    return tokenized(pixels.round().clamp(0, 255).to(torch.uint8), selection)


def _warm_up(
    step: Step, steps: Loop, state: State, train: Split, norms: Params, size: int, device: torch.device
) -> tuple[float, int, int]:
    """Compile, capture and warm up, timed (the step is pure: the state stays); then peak and reserved bytes of one
    step."""
    begin = time.perf_counter()
    steps.warm_up(state)
    synchronize(device)
    seconds = time.perf_counter() - begin
    for rows in norms.values():
        rows.zero_()
    batch = _first_batch(train, norms, size, device)
    step(state, batch)  # what libraries allocate once belongs to no arm
    peak = peak_bytes(step, state, batch, device=device)
    return seconds, peak, reserved_bytes(device)


def _first_batch(train: Split, norms: Params, size: int, device: torch.device) -> Batch:
    batch = fetch(train, torch.arange(size), device)
    return (*batch, {name: rows[:size] for name, rows in norms.items()}) if norms else batch


def _row(epoch: int, metrics: Metrics, seconds: list[float], batch_size: int) -> Row:
    names = ("loss", "cross_entropy", "penalty", "correct")
    means = {name: getattr(metrics, name).double().mean().item() for name in names}
    return {
        "epoch": epoch,
        "train/loss": means["loss"],
        "train/cross_entropy": means["cross_entropy"],
        "train/penalty": means["penalty"],
        "train/accuracy": means["correct"] / batch_size,
        "train/learning_rate": metrics.learning_rate[-1].item(),
        "speed/images_per_second": len(seconds) * batch_size / sum(seconds),
        "speed/step_ms": median(seconds) * 1000,
    }


def _to(params: Params, device: torch.device) -> Params:
    return {name: tensor.to(device) for name, tensor in params.items()}


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


def _settings(arm: Arm, seed: int, preset: str, recipe: Recipe) -> dict[str, str | int | float | bool]:
    """What HParams shows: the arm, each optimization (off, on or its value in the arm's name), and the recipe."""
    parts = {base: value or "on" for base, _, value in (part.partition("@") for part in arm.name.split("+"))}
    present = {name: parts.get(name, "off") for name in REGISTRY}
    terms = {f"recipe/{k}": v for k, v in dataclasses.asdict(recipe).items() if isinstance(v, bool | int | float | str)}
    return {"arm": arm.name, **present, "seed": seed, "recipe/preset": preset, **terms}
