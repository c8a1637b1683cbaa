"""Evaluates a model: in a study after each epoch, and by evaluate.py the best weights of a cell."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ablations.study import schema
from ablations.study.about import About
from ablations.study.arms import BASELINE, Arm, optimizations, parse, read_settings
from ablations.study.recipes import Recipe
from ablations.study.store import refuse_old
from core import model, plugins
from core.data.augment import preparation
from core.data.batches import gather
from core.data.splits import Data, Split, outlined
from core.errors import InputError
from core.ops import Ops, Params
from core.parallel import ALONE, Share, summed
from core.step import Prepare
from core.weights import checkpoints

BATCH = 128  # images: larger ones leave a processor's cache


class Evaluation(NamedTuple):
    """Of every image [N] (bool, CPU) whether it is classified correctly, and the mean cross entropy."""

    correct: Tensor
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of correct images, 0 to 1."""
        return int(self.correct.sum()) / len(self.correct)


@torch.no_grad()
def evaluate(
    params: Params,
    split: Split,
    config: model.Config,
    ops: Ops,
    prepare: Prepare,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    share: Share = ALONE,
) -> Evaluation:
    """The model on every image of a split, computed in `dtype`, without any randomness. Of several processes each takes
    its turn at a batch, and all know of all."""
    device = device or split.images.device
    loss = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros(len(split.labels), dtype=torch.int64, device=device)
    forward = model.bind(config, ops, dtype)
    for index in torch.arange(len(split.labels)).split(BATCH)[share.rank :: share.world]:
        images, labels = fetch(split, index, device)
        logits = forward(params, prepare(images, None), None).logits.float()
        correct[int(index[0]) : int(index[-1]) + 1] = logits.argmax(-1) == labels
        loss = loss + F.cross_entropy(logits, labels, reduction="sum")
    return Evaluation(summed(correct, share).bool().cpu(), summed(loss, share).item() / len(split.labels))


def fetch(split: Split, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """These images [n,C,S,S] and labels [n], on the device."""
    images, labels = gather(split, index.to(split.labels.device))
    return images.to(device), labels.to(device)


class Trained(NamedTuple):
    """A cell's best model and what it was trained under."""

    arm: Arm
    params: Params
    config: model.Config
    recipe: Recipe
    about: dict[str, Any]


def describe(arm: Arm, seed: int, config: model.Config, recipe: Recipe, data: Data, accuracy: float) -> dict[str, Any]:
    """What a checkpoint says of itself: all that `load` and `accuracy` need to evaluate it."""
    return {
        "arm": arm.name,
        "seed": seed,
        "accuracy": accuracy,
        "data": data.name,
        "classes": data.classes,
        "mean": data.mean,
        "std": data.std,
        "config": model.described(config),
        "recipe": vars(recipe),
    }


def load(cell: Path, model_of: str | None = None) -> Trained:
    """The best model of a cell (its folder, or the checkpoint itself). Raises InputError for a file that is not a
    study's checkpoint, or whose weights do not have the shapes it states.

    model_of: the model of others that it is of, where that is code in a file, which a checkpoint alone does not run.
    """
    if (cell / "study.json").is_file():
        raise InputError(f"'{cell}' is a whole study; pass one of its cells, such as {cell}/cells/{BASELINE}/seed0")
    if cell.is_dir() and (study := Path(os.path.normpath(cell / "../.."))).joinpath("study.json").is_file():
        refuse_old(study)
    params, about = checkpoints.load(cell / "best.safetensors" if cell.is_dir() else cell)
    try:
        About.model_validate_json(json.dumps(about))
        fields: dict[str, Any] = {**about["recipe"], **{k: tuple(about["recipe"][k]) for k in ("set", "plugin")}}
        recipe = Recipe(**fields)
        folder, own = Path(os.path.abspath(cell)), (about["arm"], f"seed{about['seed']}")
        if cell.is_dir() and folder.parent.parent.name == "cells" and own != (folder.parent.name, folder.name):
            raise InputError(
                f"'{cell}/best.safetensors' is of another cell ({'/'.join(own)}); put back this one's, or pass the file"
            )
        if unknown := plugins.missing(optimizations(about["arm"]), recipe.plugin):
            raise InputError(f"'{cell}': {unknown}")
    except InputError:
        raise
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"'{cell}' is not a checkpoint of a study of this version ({schema.said(error)}); pass a cell's folder, "
            "such as runs/NAME/cells/ARM/seed0"
        ) from error
    try:
        arm = parse(about["arm"], read_settings(recipe.set))
        recipe.dtype(arm)
        config = _config(arm, recipe, about, model_of)
        params = model.from_state_dict(config, params)
        params = checkpoints.check(params, config, model.fit(arm.ops, config))
    except InputError as error:
        raise InputError(f"'{cell}': {error}") from error
    return Trained(arm, {name: tensor.float() for name, tensor in params.items()}, config, recipe, about)


def _config(arm: Arm, recipe: Recipe, about: dict[str, Any], model_of: str | None) -> model.Config:
    """What the recipe makes of the arm on such images; InputError if the checkpoint says that it is of another one."""
    if model_of is None and recipe.model is not None and recipe.model.startswith("module:"):
        raise InputError(f"its model is code in a file; pass --model {recipe.model} to run it")
    data = outlined(about["data"], about["recipe"]["image"], len(about["mean"]), about["classes"], (1, 1))
    config = replace(recipe, model=model_of or recipe.model, device="cpu").config(arm, data)
    made, said = model.described(config), about["config"]
    if odd := [k for k in {**made, **said} if made.get(k) != said.get(k)]:
        changes = ", ".join(f"{k} {said.get(k)}, and by the recipe {made.get(k)}" for k in odd)
        raise InputError(f"it says that its model has {changes}: it is damaged; train the cell again")
    return config


def accuracy(trained: Trained, data: Data, device: torch.device) -> Evaluation:
    """A trained model on the validation images of a data set, normalised as its training images were. InputError for
    other classes, and where its outputs are not finite."""
    classes = tuple(trained.about["classes"])
    if data.classes != classes:
        raise InputError(
            f"the model tells {len(classes)} classes apart ({_some(classes)}), '{data.name}' has "
            f"{len(data.classes)} ({_some(data.classes)}); pass --data with the same classes, such as --data "
            f"{trained.about['data']}"
        )
    prepare = preparation(tuple(trained.about["mean"]), tuple(trained.about["std"]))
    params = {name: tensor.to(device) for name, tensor in trained.params.items()}
    dtype = trained.recipe.dtype(trained.arm)
    ops = model.fit(trained.arm.ops, trained.config)
    found = evaluate(params, data.val, trained.config, ops, prepare, dtype, device)
    if not isfinite(found.loss):
        raise InputError(f"the model's loss on '{data.name}' is {found.loss}: its outputs are no numbers")
    return found


def _some(classes: Sequence[str]) -> str:
    return ", ".join(classes[:3]) + (", …" if len(classes) > 3 else "")
