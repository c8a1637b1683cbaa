"""A cell: an arm at a seed. What does not depend on the seed is prepared once; training takes that and the seed."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from statistics import median
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ablations.study.arms import Arm
from ablations.study.evaluation import Evaluation, evaluate, fetch
from ablations.study.initialization import initial
from ablations.study.recipes import Recipe
from ablations.study.recorder import Recorder
from ablations.study.store import Result, Row
from ablations.study.token_pictures import tokenized
from core import engine, measure, rng, vit
from core.account.step import Account, account, planned
from core.data.splits import Data
from core.errors import InputError
from core.layers import EXACT
from core.ops import Ops, Params
from core.optimizers import AdamW
from core.step import Batch, Metrics, Prepare, State, Step, objective, start
from core.transforms.registry import REGISTRY


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

    def note(self, text: str) -> None:
        """What else there is to say."""


class WarmedUp(NamedTuple):
    """Seconds to compile, capture and warm up; then the peak bytes of one step, and the most that was reserved."""

    seconds: float
    peak: int
    reserved: int


@dataclass(frozen=True, eq=False)
class Prepared:
    """What an arm, a recipe (resolved) and data make together, whatever the seed. Nothing is compiled, and nothing
    lies on the device, before it is asked for."""

    arm: Arm
    recipe: Recipe
    data: Data
    config: vit.VitConfig
    plain: vit.VitConfig
    """Of the same model without the arm's optimizations."""
    prepare: Prepare
    dtype: torch.dtype
    optimizer: AdamW

    @cached_property
    def ops(self) -> Ops:
        """The arm's primitives, planned for the recipe's batch."""
        recipe = self.recipe
        return planned(self.config, self.arm.ops, recipe.batch_size, self.dtype, self.optimizer, recipe.image)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch.device(self.recipe.device)

    @property
    def steps(self) -> int:
        """Training steps of an epoch."""
        return len(self.data.train.labels) // self.recipe.batch_size

    @cached_property
    def step(self) -> Step:
        """The training step, under the recipe's engine."""
        how = self.recipe.engine, self.recipe.regions
        return engine.build(self.config, self.ops, self.prepare, self.dtype, self.optimizer, *how)

    @cached_property
    def loop(self) -> engine.Loop:
        """What takes a state through an epoch."""
        return engine.loop(self.recipe.engine, self.step, self.data.train, self.recipe.batch_size, self.device)

    @cached_property
    def warmed_up(self) -> WarmedUp:
        """The loop, ready. A step alone comes first: captured, the step's memory could not be had a second time."""
        state, batch = self.start(0, rng.key(0, self.device)), self.batch(self.recipe.batch_size)
        begin = time.perf_counter()
        self.step(state, batch)  # what libraries allocate once belongs to no arm
        measure.synchronize(self.device)
        alone = time.perf_counter()
        peak = measure.peak_bytes(self.step, state, batch, device=self.device)
        reserved = measure.reserved_bytes(self.device)
        again = time.perf_counter()
        self.loop.warm_up(state)
        measure.synchronize(self.device)
        return WarmedUp(alone - begin + time.perf_counter() - again, peak, reserved)

    def start(self, seed: int, key: Tensor) -> State:
        """The state before the first step: parameters by the seed; the steps draw from the key."""
        params = initial(self.recipe, self.arm, self.data, seed)
        params = {name: tensor.to(self.device) for name, tensor in params.items()}
        return start(params, self.optimizer, key, self.ops)

    def batch(self, size: int) -> Batch:
        """The first training images, on the device."""
        return fetch(self.data.train, torch.arange(min(size, len(self.data.train.labels))), self.device)

    def account(self, batch: int | None = None, mode: str = "train") -> Account:
        """What a step of so many images costs, the recipe's unless given; with mode "eval" a forward pass."""
        size = batch or self.recipe.batch_size
        return account(self.config, self.ops, size, self.dtype, mode, self.optimizer, self.recipe.image)

    @cached_property
    def costs(self) -> Account:
        """What a step of the recipe's batch costs."""
        return self.account()

    @property
    def plain_flops(self) -> int:
        """FLOPs of a step without the arm's optimizations: what MFU counts, whatever an arm saves or computes again."""
        return _plain_flops(self.plain, self.recipe.batch_size, self.dtype)

    def holding_out(self, seed: int) -> "Prepared":
        """The same over the images that the seed trains on; what is compiled and measured is shared."""
        data = self.data.holding_out(seed)
        if data is self.data:
            return self
        shared = {"ops": self.ops, "step": self.step, "warmed_up": self.warmed_up, "costs": self.costs}
        other = replace(self, data=data)
        vars(other).update(shared)
        return other

    def evaluate(self, params: Params) -> Evaluation:
        """The validation images under these parameters."""
        return evaluate(params, self.data.val, self.config, self.ops, self.prepare, self.dtype, self.device)

    def check(self) -> None:
        """InputError, with the arm's name, for what cannot run: the loss of two images is tried."""
        try:
            loss = objective(self.config, self.ops, self.prepare, self.dtype)
            loss(self.start(0, rng.key(0)).params, self.batch(2), rng.key(0, self.device))
        except InputError as error:
            raise InputError(f"arm '{self.arm.name}': {error}") from error


@cache
def _plain_flops(config: vit.VitConfig, batch: int, dtype: torch.dtype) -> int:
    return account(config, EXACT, batch, dtype).flops


def prepared(arm: Arm, recipe: Recipe, data: Data) -> Prepared:
    """What these make together; InputError, with the arm's name, if they do not fit."""
    try:
        plain, config = recipe.plain_model(arm, data), recipe.model(arm, data)
        optimizer = recipe.optimizer(len(data.train.labels) // recipe.batch_size)
        return Prepared(arm, recipe, data, config, plain, recipe.prepare(data), recipe.dtype(arm), optimizer)
    except InputError as error:
        raise InputError(f"arm '{arm.name}': {error}") from error


def train(cell: Prepared, seed: int, recorder: Recorder, progress: Progress) -> tuple[Result, Params]:
    """The result of a cell, and the parameters with the best validation accuracy.

    Initial weights, held-out images, data order and augmentation depend on the seed alone. Evaluation, logging,
    compilation and the memory pass are outside the training time. Raises FloatingPointError if the loss stops being
    finite.
    """
    cell = cell.holding_out(seed)
    recipe, device = cell.recipe, cell.device
    progress.cell(cell.arm.name, seed, cell.steps * recipe.epochs)
    if (picture := _tokens(cell)) is not None:
        recorder.picture("tokens", picture)
    memory = cell.warmed_up
    order_key, step_key = rng.split(rng.key(seed, device), 2)
    state = cell.start(seed, step_key)
    cell.loop.warm_up(state)
    history: list[Row] = []
    evaluations: list[Evaluation] = []
    intervals: list[float] = []
    best: tuple[float, Params] = (-1.0, state.params)
    for epoch in range(1, recipe.epochs + 1):
        order = rng.permutation(rng.fold_in(order_key, epoch), len(cell.data.train.labels))
        state, metrics, seconds = _epoch(cell, state, order, progress)
        intervals += seconds
        evaluated = cell.evaluate(state.params)
        row = _row(epoch, metrics, seconds, recipe.batch_size) | {
            "val/accuracy": evaluated.accuracy,
            "val/loss": evaluated.loss,
            "memory/peak_mib": memory.peak / 2**20,
            "seconds": sum(intervals),
        }
        history.append(row)
        evaluations.append(evaluated)
        recorder.epoch(row)
        progress.epoch(row)
        if not all(abs(loss) < float("inf") for loss in (row["train/loss"], row["val/loss"])):
            raise FloatingPointError(f"loss is {row['train/loss']} (validation {evaluated.loss}) after epoch {epoch}")
        if evaluated.accuracy > best[0]:
            best = evaluated.accuracy, state.params
    recorder.correct(torch.stack([e.correct for e in evaluations]))
    result = _result(cell, memory, history, intervals, best[0]) | {"held_out": cell.data.held_out(seed)}
    return result, best[1]


def _epoch(cell: Prepared, state: State, order: Tensor, progress: Progress) -> tuple[State, Metrics, list[float]]:
    """The state after an epoch, its metrics, and the seconds of every step."""
    ticks = measure.Ticks(cell.device)
    ticks.mark()

    def done() -> None:
        ticks.mark()
        progress.step()

    state, metrics = cell.loop.epoch(state, order, done)
    return state, metrics, ticks.intervals()


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


def _result(
    cell: Prepared, memory: WarmedUp, history: list[Row], intervals: list[float], best_accuracy: float
) -> Result:
    recipe, account, last = cell.recipe, cell.costs, history[-1]
    return {
        "parameters": account.parameters,
        "epochs": recipe.epochs,
        "best_val_accuracy": best_accuracy,
        "final_val_accuracy": last["val/accuracy"],
        "final_val_loss": last["val/loss"],
        "final_train_loss": last["train/loss"],
        "train_seconds": sum(intervals),
        "images_per_second": len(intervals) * recipe.batch_size / sum(intervals),
        "step_ms_median": median(intervals) * 1000,
        "peak_bytes": memory.peak,
        "reserved_bytes": memory.reserved,
        "predicted_peak_bytes": account.peak_bytes,
        "kept_bytes": account.kept_bytes,
        "flops_per_image": account.flops // recipe.batch_size,
        "gpu": measure.gpu_state(cell.device),
        "kept_by_op": account.kept_by_op,
        "warmup_seconds": memory.seconds,
        "batch_size": recipe.batch_size,
        "engine": recipe.engine,
        "device": recipe.device,
        "precision": cell.arm.precision or recipe.precision,
        "torch": torch.__version__,
    }


def _tokens(cell: Prepared) -> Tensor | None:
    """A picture of how some validation images are cut into patches, by an arm that chooses them."""
    for name, parameters in cell.arm.parameters.items():
        if layout := REGISTRY[name].layout:
            return _cut(layout(**parameters), cell)
    return None


def _cut(layout: Callable[[Tensor], tuple[Tensor, Tensor]], cell: Prepared) -> Tensor:
    images, _ = fetch(cell.data.val, torch.linspace(0, len(cell.data.val.labels) - 1, 6).long(), cell.device)
    resized, selection = layout(cell.prepare(images, None))
    pixels = F.interpolate(images.float(), resized.shape[-2:], mode="bilinear", align_corners=False)
    return tokenized(pixels.round().clamp(0, 255).to(torch.uint8), selection)
