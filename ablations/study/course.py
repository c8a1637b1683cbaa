"""How far a cell has come: all that its continuation needs beside arm, recipe, data and seed."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_structure, tree_unflatten

from ablations.study import schema
from ablations.study.evaluation import Evaluation
from ablations.study.snapshots import Content
from ablations.study.store import Row
from core.ops import Params
from core.step import Metrics, State

GAP, TIMES = 1.0, 20  # a step of more seconds, and of more of the usual ones, was not at work all the while


@dataclass
class Course:
    """The state after the last step, and what was seen on the way."""

    state: State
    best: Params
    """Of the best validation accuracy."""
    best_accuracy: float = -1.0
    history: list[Row] = field(default_factory=list)
    """Of every evaluated epoch."""
    times: list[float] = field(default_factory=list)
    """When it was (POSIX seconds)."""
    correct: list[Tensor] = field(default_factory=list)
    """Which validation images were classified correctly then, bool [images]."""
    intervals: list[float] = field(default_factory=list)
    """Seconds of every step, by the clock."""
    pieces: list[Metrics] = field(default_factory=list)
    """Of the steps since the last evaluation, [steps] each."""
    loss: float = float("nan")
    """Of the last step."""

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.intervals)

    @property
    def seconds(self) -> list[float]:
        """Of every step; of one that the process was stopped in (Ctrl-Z, a machine that was paused) the median so far,
        so that training time is that of work: one that took more than GAP seconds and TIMES the median."""
        usual = median(self.intervals)
        return [usual if taken > max(GAP, TIMES * usual) else taken for taken in self.intervals]

    def advance(self, state: State, metrics: Metrics, seconds: list[float]) -> None:
        """Some more steps. FloatingPointError at the first loss that is not finite."""
        losses = metrics.loss.double().cpu()
        odd = (~losses.isfinite()).nonzero()
        if len(odd):
            i = int(odd[0])
            last = losses[i - 1].item() if i else self.loss
            raise FloatingPointError(
                f"loss is {losses[i].item():g} at step {self.steps + i + 1} (epoch {len(self.history) + 1}); the last "
                f"finite one was {last:g}"
            )
        self.state, self.loss = state, losses[-1].item()
        self.pieces.append(metrics)
        self.intervals += seconds

    def evaluate(self, evaluated: Evaluation, batch_size: int, peak: int) -> Row:
        """An epoch ends; returns its metrics. FloatingPointError for a validation loss that is not finite."""
        metrics = Metrics(*(torch.cat(column) for column in zip(*self.pieces, strict=True)))
        seconds = self.seconds[-len(metrics.loss) :]  # those before stay what they were told to be
        row = _row(len(self.history) + 1, metrics, seconds, batch_size) | {
            "val/accuracy": evaluated.accuracy,
            "val/loss": evaluated.loss,
            "memory/peak_mib": peak / 2**20,
            "seconds": sum(seconds, self.history[-1]["seconds"] if self.history else 0.0),
        }
        self.history.append(row)
        self.times.append(time.time())
        self.correct.append(evaluated.correct)
        self.pieces = []
        if not abs(evaluated.loss) < float("inf"):
            raise FloatingPointError(
                f"validation loss is {evaluated.loss:g} after step {self.steps} (epoch {len(self.history)}); the "
                f"training loss was {self.loss:g}"
            )
        if evaluated.accuracy > self.best_accuracy:
            self.best_accuracy, self.best = evaluated.accuracy, self.state.judged
        return row

    def pack(self) -> Content:
        """As tensors by name and JSON."""
        tensors = dict(_leaves(self.state)) | {f"best.{name}": tensor for name, tensor in self.best.items()}
        tensors["intervals"] = torch.tensor(self.intervals, dtype=torch.float64)
        if self.correct:
            tensors["correct"] = torch.stack(self.correct)
        if self.pieces:
            columns = zip(*self.pieces, strict=True)
            named = zip(Metrics._fields, columns, strict=True)
            tensors |= {f"metrics.{name}": torch.cat(column) for name, column in named}
        about = {"best_accuracy": self.best_accuracy, "history": self.history, "times": self.times, "loss": self.loss}
        return tensors, about

    def check(self, tensors: dict[str, Tensor], about: dict[str, Any], steps: int) -> None:
        """ValueError for what `pack` did not write of a course like this one, before its first step. steps: of an
        epoch."""
        schema.Reached.model_validate_json(json.dumps(about))
        own = {name: tensor for name, tensor in self.pack()[0].items() if name != "intervals"}
        if odd := [n for n, t in own.items() if (tensors[n].dtype, tensors[n].shape) != (t.dtype, t.shape)]:
            raise ValueError(f"its {odd[0]} is not of this model")
        history, taken = about["history"], tensors["intervals"]
        since = len(taken) - len(history) * steps
        metrics = {name: len(tensor) for name, tensor in tensors.items() if name.startswith("metrics.")}
        shares = tensors["correct"].double().mean(1).tolist() if history else []
        accuracies = [row["val/accuracy"] for row in history]
        wrong = {
            "seconds": taken.dtype != torch.float64 or not ((taken >= 0) & taken.isfinite()).all() or taken.dim() > 1,
            "steps": not 0 <= since <= steps or len(taken) != tensors["state.step"],
            "metrics": metrics != {f"metrics.{name}": since for name in Metrics._fields if since},
            "epochs": [row["epoch"] for row in history] != list(range(1, len(about["times"]) + 1)),
            "accuracies": (history and tensors["correct"].dtype != torch.bool)
            or about["best_accuracy"] != max(accuracies, default=-1.0)
            or not np.allclose(shares, accuracies, atol=1e-6),
        }
        if odd := [name for name, found in wrong.items() if found]:
            raise ValueError(f"its {' and '.join(odd)} are not a course's")

    def restored(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> "Course":
        """What `pack` wrote, where this is the course before the first step.

        Tensors are copied: those of a file may lie at addresses at which a library adds up in another order.
        """
        device = self.state.step.device
        on_device = {name: tensor.to(device, copy=True) for name, tensor in tensors.items() if name != "correct"}
        found = [f"metrics.{name}" for name in Metrics._fields if f"metrics.{name}" in tensors]
        return Course(
            tree_unflatten([on_device[name] for name, _ in _leaves(self.state)], tree_structure(self.state)),
            {name: on_device[f"best.{name}"] for name in self.best},
            about["best_accuracy"],
            about["history"],
            about["times"],
            list(tensors["correct"].clone()) if "correct" in tensors else [],
            tensors["intervals"].tolist(),
            [Metrics(*(on_device[name] for name in found))] if found else [],
            about["loss"],
        )


def _leaves(state: State) -> Iterator[tuple[str, Tensor]]:
    for path, leaf in tree_flatten_with_path(state)[0]:
        yield f"state{keystr(path)}", leaf


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
