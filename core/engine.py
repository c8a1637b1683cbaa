"""How a step runs: eager or compiled. The one impure room: it may compile, keep buffers and synchronise.

A CUDA graph of the step belongs here too, as the engine "graphed".
"""

from collections.abc import Callable
from typing import Any

import torch

from core.errors import InputError, choose
from core.step import AdamW, Objective, Step, make_step

ENGINES = ("auto", "eager", "compiled", "graphed")

# Every arm compiles the same code objects over other closures; dynamo's default of 8 would stop a lattice.
_VARIANTS = 256


def resolve(name: str, device: str) -> str:
    """The engine that `name` means on this device ("cpu" or "cuda"); raises InputError for one not to be had."""
    choose("engine", name, ENGINES)
    if name == "auto":
        return "compiled" if device == "cuda" else "eager"
    if name == "graphed":
        raise InputError("engine 'graphed' (CUDA graphs) is not available yet; pass --engine compiled or eager")
    return name


def build(loss: Objective, optimizer: AdamW, engine: str, differentiator: str = "autograd") -> Step:
    """The training step of a loss under an engine ("eager" or "compiled")."""
    return make_step(loss, optimizer, differentiator, _compile if engine == "compiled" else lambda fn: fn)


def _compile(fn: Callable[..., Any]) -> Callable[..., Any]:
    """One graph, static shapes; a graph break is an error."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    return torch.compile(fn, fullgraph=True, dynamic=False)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
