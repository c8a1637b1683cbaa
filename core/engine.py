"""How a step runs: eager or compiled. The one impure room: it may compile, keep buffers and synchronise.

A CUDA graph of the step belongs here too, as the engine "graphed".
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

from core.errors import InputError, choose
from core.step import AdamW, Objective, Step, make_step

ENGINES = ("auto", "eager", "compiled", "graphed")


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
    return torch.compile(fresh(fn), fullgraph=True, dynamic=False)


def fresh(fn: Any) -> Callable[..., Any]:
    """The same function with a code object of its own. torch.compile keeps its results by code object: the arms' losses
    would share one list, be checked against each other's guards at every call, and reach its limit."""
    return FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
