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

from ablations.arms import Arm
from ablations.pictures import tokenized
from ablations.presets import PRECISIONS, Recipe
from ablations.record import Recorder, Result, Row, cell_folder, finished
from core import graph, rng, vit, weights
from core.data import Data, Split
from core.engine import build
from core.errors import InputError
from core.measure import Ticks, peak_bytes
from core.ops import Ops, Params
from core.step import Batch, Metrics, Prepare, State, Step, cast, memory, objective, start
from core.transforms import REGISTRY


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


def check(arms: Sequence[Arm], recipe: Recipe, data: Data) -> None:
    """Refuse what cannot run before anything is written: the loss of each arm on two images."""
    device = torch.device(recipe.device)
    recipe.optimizer(len(data.train.labels) // recipe.batch_size)
    for arm in arms:
        config = recipe.model(arm, data)
        loss = objective(config, arm.ops, recipe.prepare(data), PRECISIONS[recipe.precision])
        batch = _batch(data.train, torch.arange(min(2, len(data.train.labels))), device)
        try:
            params = _to(vit.init(config, 0), device) | memory(config, len(batch[0]), device)
            loss(params, batch, rng.key(0, device))
        except InputError as error:
            raise InputError(f"arm '{arm.name}': {error}") from error


def run(arms: Sequence[Arm], seeds: int, preset: str, recipe: Recipe, data: Data, out: Path, progress: Progress) -> int:
    """Train every cell that has no result yet, seed by seed so that arms are met alike; returns how many failed.

    An arm's seeds share its step, so that only the first compiles.
    """
    data = data.to(torch.device(recipe.device))
    failed, steps = 0, dict[str, Step]()
    for seed in range(seeds):
        for arm in arms:
            folder = cell_folder(out, arm.name, seed)
            if finished(folder):
                continue
            recorder = Recorder(folder)
            try:
                if arm.name not in steps:
                    steps[arm.name] = _step(arm, recipe, data)
                result, best = train(arm, seed, steps[arm.name], recipe, data, recorder, progress)
                config = dataclasses.asdict(recipe.model(arm, data))
                weights.save(folder / "best.safetensors", best, {"arm": arm.name, "config": config})
                result = {"arm": arm.name, "seed": seed, "preset": preset, "data": data.name, **result}
                recorder.finish(result, _settings(arm, seed, preset, recipe))
                progress.done(result)
            except Exception as error:  # recorded and counted; the other cells go on
                recorder.fail(arm.name, seed, error, traceback.format_exc())
                progress.done({"arm": arm.name, "seed": seed, "error": f"{type(error).__name__}: {error}"})
                failed += 1
    return failed


def _step(arm: Arm, recipe: Recipe, data: Data) -> Step:
    loss = objective(recipe.model(arm, data), arm.ops, recipe.prepare(data), PRECISIONS[recipe.precision])
    optimizer = recipe.optimizer(len(data.train.labels) // recipe.batch_size)
    return build(loss, optimizer, recipe.engine, recipe.differentiator)


def train(
    arm: Arm, seed: int, step: Step, recipe: Recipe, data: Data, recorder: Recorder, progress: Progress
) -> tuple[Result, Params]:
    """One cell: its result and the parameters with the best validation accuracy, under the arm's step.

    Initial weights, data order and augmentation depend on the seed alone. Evaluation, logging, compilation and
    the memory pass are outside the training time. Raises FloatingPointError if the loss stops being finite.
    """
    device, config, ops = torch.device(recipe.device), recipe.model(arm, data), arm.ops
    dtype, prepare = PRECISIONS[recipe.precision], recipe.prepare(data)
    order_key, step_key = rng.split(rng.key(seed, device), 2)
    state = start(_to(vit.init(config, seed), device), step_key)
    progress.cell(arm.name, seed, len(data.train.labels) // recipe.batch_size * recipe.epochs)
    for name, parameters in arm.parameters.items():
        if layout := REGISTRY[name].layout:
            recorder.picture("tokens", _tokenized(layout(**parameters), data, prepare, device))

    norms = memory(config, len(data.train.labels), device) if arm.remembers else {}
    account = graph.account(config, ops, recipe.batch_size, dtype, remembers=arm.remembers)
    warmup_seconds, peak = _warm_up(step, state, data.train, norms, recipe.batch_size, device)
    rows: list[Row] = []
    intervals: list[float] = []
    best: tuple[float, Params] = (-1.0, state.params)
    for epoch in range(1, recipe.epochs + 1):
        order = rng.permutation(rng.fold_in(order_key, epoch), len(data.train.labels))
        state, metrics, ticks = _epoch(step, state, data.train, norms, order, recipe.batch_size, device, progress)
        intervals += ticks
        accuracy, val_loss = evaluate(state.params, data.val, config, ops, prepare, dtype, device)
        row = _row(epoch, metrics, ticks, recipe.batch_size) | {
            "val/accuracy": accuracy,
            "val/loss": val_loss,
            "memory/peak_mib": peak / 2**20,
            "seconds": sum(intervals),
        }
        rows.append(row)
        recorder.epoch(row)
        progress.epoch(row)
        if not all(map(_finite, (row["train/loss"], val_loss))):
            raise FloatingPointError(f"loss is {row['train/loss']} (validation {val_loss}) after epoch {epoch}")
        if accuracy > best[0]:
            best = accuracy, state.params
    result = {
        "parameters": vit.parameters(config),
        "epochs": recipe.epochs,
        "best_val_accuracy": best[0],
        "final_val_accuracy": rows[-1]["val/accuracy"],
        "final_train_loss": rows[-1]["train/loss"],
        "train_seconds": sum(intervals),
        "images_per_second": len(intervals) * recipe.batch_size / sum(intervals),
        "step_ms_median": median(intervals) * 1000,
        "peak_bytes": peak,
        "predicted_peak_bytes": account.peak_bytes,
        "kept_bytes": account.kept_bytes,
        "flops_per_image": account.flops // recipe.batch_size,
        "kept_by_op": account.kept_by_op,
        "warmup_seconds": warmup_seconds,
        "batch_size": recipe.batch_size,
        "engine": recipe.engine,
        "differentiator": recipe.differentiator,
        "device": recipe.device,
        "precision": recipe.precision,
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
    step: Step, state: State, train: Split, norms: Params, batch_size: int, device: torch.device
) -> tuple[float, int]:
    """Compile and warm up on one batch (the step is pure: the state stays), then take its peak bytes."""
    batch = _training_batch(train, norms, torch.arange(batch_size), device)
    begin = time.perf_counter()
    step(state, batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begin
    return seconds, peak_bytes(step, state, batch, device=device)


def _epoch(
    step: Step,
    state: State,
    train: Split,
    norms: Params,
    order: Tensor,
    size: int,
    device: torch.device,
    progress: Progress,
) -> tuple[State, list[Metrics], list[float]]:
    """All whole batches in this order; the seconds of each include fetching it."""
    ticks, metrics = Ticks(device), []
    ticks.mark()
    for index in order.split(size):
        if len(index) < size:
            break
        state, measured = step(state, _training_batch(train, norms, index, device))
        for name, rows in (measured.norms or {}).items():
            norms[name][index] = rows
        metrics.append(measured._replace(norms=None))
        ticks.mark()
        progress.step()
    return state, metrics, ticks.intervals()


def _row(epoch: int, metrics: list[Metrics], seconds: list[float], batch_size: int) -> Row:
    names = ("loss", "cross_entropy", "penalty", "correct")
    means = {name: torch.stack([getattr(m, name) for m in metrics]).double().mean().item() for name in names}
    return {
        "epoch": epoch,
        "train/loss": means["loss"],
        "train/cross_entropy": means["cross_entropy"],
        "train/penalty": means["penalty"],
        "train/accuracy": means["correct"] / batch_size,
        "train/learning_rate": metrics[-1].learning_rate.item(),
        "speed/images_per_second": len(seconds) * batch_size / sum(seconds),
        "speed/step_ms": median(seconds) * 1000,
    }


@torch.no_grad()
def evaluate(
    params: Params,
    split: Split,
    config: vit.VitConfig,
    ops: Ops,
    prepare: Prepare,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    batch_size: int = 500,
) -> tuple[float, float]:
    """Accuracy (0 to 1) and mean cross entropy over a split, without any randomness."""
    device = device or split.images.device
    params = cast(params, dtype)
    correct = loss = torch.zeros((), dtype=torch.float64, device=device)
    for index in torch.arange(len(split.labels)).split(batch_size):
        images, labels = _batch(split, index, device)
        logits = vit.forward(params, prepare(images, None), config, ops).logits.float()
        correct = correct + (logits.argmax(-1) == labels).sum()
        loss = loss + F.cross_entropy(logits, labels, reduction="sum")
    return correct.item() / len(split.labels), loss.item() / len(split.labels)


def _batch(split: Split, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    index = index.to(split.labels.device)
    return split.images[index].to(device), split.labels[index].to(device)


def _training_batch(split: Split, norms: Params, index: Tensor, device: torch.device) -> Batch:
    """The batch, with its rows of the remembered gradient norms if there are any."""
    batch = _batch(split, index, device)
    return (*batch, {name: rows[index.to(device)] for name, rows in norms.items()}) if norms else batch


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
