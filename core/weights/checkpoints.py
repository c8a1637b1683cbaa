"""Checkpoints in and out as safetensors (never pickle), and whether parameters are those of a model."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core import files
from core.errors import InputError
from core.foreign.model import Foreign
from core.layers import EXACT
from core.model import Config, shapes
from core.ops import Ops, Params


def check(state: Mapping[str, Tensor], config: Config, ops: Ops = EXACT) -> Params:
    """The parameters in the model's order, if they are exactly those of `config` under `ops`; else InputError."""
    blocks = len({name.split(".")[1] for name in state if name.startswith("blocks.") and name.count(".") > 1})
    if not isinstance(config, Foreign) and blocks != config.depth:
        raise InputError(f"the weights have {blocks} blocks, the model needs {config.depth}: {config}")
    wanted = shapes(config, ops)
    for problem, names in (
        ("lack", [n for n in wanted if n not in state]),
        ("have the unknown", [n for n in state if n not in wanted]),
    ):
        if names:
            raise InputError(f"the weights {problem} {', '.join(names[:3])} ({len(names)} in all) for {config}")
    for name, shape in wanted.items():
        if tuple(state[name].shape) != shape:
            raise InputError(f"{name} has shape {tuple(state[name].shape)}, the model needs {shape}: {config}")
        if not state[name].is_floating_point():
            raise InputError(f"{name} is of {state[name].dtype}, and weights are floating-point numbers")
        if not state[name].float().isfinite().all():
            raise InputError(f"{name} has values that are not finite: nothing can be computed with such weights")
    return {name: state[name].detach() for name in wanted}


def save(path: Path, params: Params, about: dict[str, Any]) -> None:
    """Write parameters and what they are (JSON) to a safetensors file, atomically, with their digest."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in params.items()}
    text = json.dumps(about)
    metadata = {"about": text, "sha256": _digest(tensors, text)}
    files.write(path, safetensors.torch.save(tensors, metadata))


def load(path: Path) -> tuple[Params, dict[str, Any]]:
    """Parameters (CPU) and description from a file of `save`; description {} where it has none. What becomes of the
    file afterwards changes nothing.

    Raises InputError if the file does not exist, is not safetensors, or is not as it was saved.
    """
    if not path.is_file():
        raise InputError(f"checkpoint '{path}' does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            params = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
        for name, tensor in params.items():
            tensor.flatten()[:1].to(torch.complex128)  # of a type that torch computes with
            if tensor.ndim > 64:
                raise ValueError(f"{name} has {tensor.ndim} axes")
        text = metadata.get("about", "{}")
        about = json.loads(text)
    except (SafetensorError, OSError, ValueError, RecursionError, AttributeError, RuntimeError, MemoryError) as error:
        raise InputError(f"'{path}' is not a safetensors file of weights ({error})") from error
    if not isinstance(about, dict):
        raise InputError(f"'{path}' describes itself as {text[:40]}, which is no table")
    if metadata.get("sha256", found := _digest(params, text)) != found:
        raise InputError(f"'{path}' is damaged: its weights are not those that were saved")
    return params, about


def _digest(params: Params, about: str) -> str:
    return hashlib.sha256((files.digests(params) + about).encode()).hexdigest()
