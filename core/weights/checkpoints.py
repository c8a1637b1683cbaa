"""Checkpoints in and out as safetensors (never pickle), and whether parameters are those of a model."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.errors import InputError
from core.layers import EXACT
from core.model import Config, shapes
from core.ops import Ops, Params


def check(state: Mapping[str, Tensor], config: Config, ops: Ops = EXACT) -> Params:
    """The parameters in the model's order, if they are exactly those of `config` under `ops`; else InputError."""
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
    return {name: state[name].detach() for name in wanted}


def save(path: Path, params: Params, about: dict[str, Any]) -> None:
    """Write parameters and what they are (JSON) to a safetensors file, atomically."""
    temporary = path.with_suffix(".partial")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in params.items()}
    save_file(tensors, temporary, metadata={"about": json.dumps(about)})
    os.replace(temporary, path)


def load(path: Path) -> tuple[Params, dict[str, Any]]:
    """Parameters (CPU) and description from a file of `save`; description {} where it has none.

    Raises InputError if the file does not exist or is not safetensors.
    """
    if not path.is_file():
        raise InputError(f"checkpoint '{path}' does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            params = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return params, json.loads((file.metadata() or {}).get("about", "{}"))
    except SafetensorError as error:
        raise InputError(f"'{path}' is not a safetensors file ({error})") from error
