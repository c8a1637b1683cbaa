"""Training a cell: from its last snapshot or its first step to its result."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from ablations.study import processes
from ablations.study.cells import Prepared, WarmedUp
from ablations.study.course import Course
from ablations.study.evaluation import fetch
from ablations.study.progress import Terminal
from ablations.study.recorder import Recorder
from ablations.study.signals import Stop, Stopped
from ablations.study.snapshots import Snapshots
from ablations.study.store import Result
from core import measure, parallel, rng
from core.ops import Params
from core.transforms.registry import REGISTRY


def train(
    cell: Prepared,
    seed: int,
    recorder: Recorder,
    progress: Terminal,
    snapshots: Snapshots,
    stop: Stop,
    mine: Callable[[], None] = lambda: None,
) -> tuple[Result, Params]:
    """The result of a cell, and the parameters with the best validation accuracy; from its last snapshot if it has one.

    Initial weights, held-out images, data order and augmentation depend on the seed alone. Evaluation, logging,
    compilation, snapshots and the memory pass are outside the training time. mine: raises if the cell is another
    process's by now. Raises FloatingPointError if the loss stops being finite; Stopped, after a last snapshot, if
    told to. Several processes that train a cell together do all this alike; what one of them only can decide, the
    leader does.
    """
    processes.lead("train", cell.arm.name, seed)
    cell = cell.holding_out(seed)
    recipe, share, together = cell.recipe, cell.share, cell.share.world > 1
    order_key, step_key = rng.split(rng.key(seed, cell.device), 2)
    state = cell.start_whole(seed, step_key)
    course = _continued(Course(state, state.params), cell.steps, snapshots, progress)
    course.state, course.best = parallel.shard_state(course.state, share), parallel.shard(course.best, share)
    progress.cell(cell.arm.name, seed, cell.steps * recipe.epochs, course.steps)
    for row, when in zip(course.history, course.times, strict=True):
        recorder.epoch(row, when)
    memory = cell.warmed_up
    cell.loop.warm_up(course.state)
    snapshots.begin(measure.tensor_bytes(course.state) * 2)

    def save() -> None:
        mine()
        snapshots.save(course.steps, _whole(cell, course).pack)

    try:
        for epoch in range(len(course.history) + 1, recipe.epochs + 1):
            order = rng.permutation(rng.fold_in(order_key, epoch), len(cell.data.train.labels))
            while course.steps < epoch * cell.steps:
                with stop.finishing():
                    _steps(cell, course, order, lambda: bool(stop.number) or snapshots.due(), progress)
                    if processes.told(snapshots.due() or (together and bool(stop.number))):
                        save()
                    stop.number = processes.told(stop.number)
            evaluated = cell.evaluate(parallel.whole(course.state.judged, cell.shapes, share))
            with stop.finishing():
                row = course.evaluate(evaluated, recipe.batch_size, memory.peak)
                recorder.epoch(row, course.times[-1])
                progress.epoch(row)
    except Stopped:
        if course.steps and not together:  # together they have saved what they can
            save()
        raise
    mine()
    recorder.correct(torch.stack(course.correct))
    result = _result(cell, memory, course)
    return result | {"held_out": cell.data.held_out(seed)}, parallel.whole(course.best, cell.shapes, share)


def _whole(cell: Prepared, course: Course) -> Course:
    """The course with its tensors whole."""
    state = parallel.whole_state(course.state, cell.shapes, cell.share)
    return replace(course, state=state, best=parallel.whole(course.best, cell.shapes, cell.share))


def _continued(course: Course, steps: int, snapshots: Snapshots, progress: Terminal) -> Course:
    """The course of the last snapshot, or this one. steps: of an epoch."""
    if (content := processes.told(snapshots.load(partial(course.check, steps=steps)))) is None:
        return course
    found = course.restored(*content)
    progress.note(f"continued from step {found.steps} ({snapshots.folder})")
    return found


def _steps(cell: Prepared, course: Course, order: Tensor, end: Callable[[], bool], progress: Terminal) -> None:
    """The steps of an epoch that are left, or as many as are done when `end` says so."""
    ticks = measure.Ticks(cell.device)
    ticks.mark()

    def done() -> bool:
        ticks.mark()
        progress.step()
        return bool(processes.told(end()))

    ahead = order[course.steps % cell.steps * cell.recipe.batch_size :]
    state, metrics = cell.loop.epoch(course.state, ahead, done)
    course.advance(state, metrics, ticks.intervals())


def _result(cell: Prepared, memory: WarmedUp, course: Course) -> Result:
    recipe, account, last = cell.recipe, cell.costs, course.history[-1]
    return {
        "parameters": account.parameters,
        "epochs": recipe.epochs,
        "best_val_accuracy": course.best_accuracy,
        "final_val_accuracy": last["val/accuracy"],
        "final_val_loss": last["val/loss"],
        "final_train_loss": last["train/loss"],
        "train_seconds": last["seconds"],
        "stopped_seconds": max(0.0, round(sum(course.intervals) - last["seconds"], 6)),
        "images_per_second": course.steps * recipe.batch_size / last["seconds"],
        "step_ms_median": median(course.seconds) * 1000,
        "peak_bytes": memory.peak,
        "reserved_bytes": memory.reserved,
        "predicted_peak_bytes": account.peak_bytes,
        "kept_bytes": account.kept_bytes,
        "flops_per_image": account.flops // cell.images,
        "gpu": measure.gpu_state(cell.device),
        "kept_by_op": account.kept_by_op,
        "warmup_seconds": memory.seconds,
        "batch_size": recipe.batch_size,
        "engine": recipe.engine,
        "device": recipe.device,
        "precision": cell.arm.precision or recipe.precision,
        "torch": torch.__version__,
    }


def tokens(cell: Prepared) -> tuple[Tensor, Tensor] | None:
    """Some validation images, and the patches that an arm which chooses them cuts them into."""
    layout = next((of(**given) for name, given in cell.arm.parameters.items() if (of := REGISTRY[name].layout)), None)
    if layout is None:
        return None
    images, _ = fetch(cell.data.val, torch.linspace(0, len(cell.data.val.labels) - 1, 6).long(), cell.device)
    resized, patches = layout(cell.prepare(images, None))
    pixels = F.interpolate(images.float(), resized.shape[-2:], mode="bilinear", align_corners=False)
    return pixels.round().clamp(0, 255).to(torch.uint8), patches
