"""Initial values of parameters, the model's and those that transforms bring."""

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from core import rng
from core.ops import Parameter, Params


def uniform(bound: float) -> Callable[[Tensor], Tensor]:
    """Initial values uniform in +-bound."""
    return lambda draws: (2 * draws - 1) * bound


def normal(deviation: float) -> Callable[[Tensor], Tensor]:
    """Initial values normal around 0."""
    return lambda draws: (deviation * torch.special.ndtri(draws.double() + 2**-25)).float()


def draw(wanted: dict[str, Parameter], seed: int) -> Params:
    """Initial values of parameters, float32; each depends on the seed and its name only."""
    key = rng.key(seed)
    return {name: _initial(name, p, key) for name, p in wanted.items()}


def _initial(name: str, parameter: Parameter, key: Tensor) -> Tensor:
    shape, initial = parameter
    if isinstance(initial, int | float):
        return torch.full(shape, float(initial))
    return initial(rng.uniform(rng.fold_in(key, zlib.crc32(name.encode())), shape))
