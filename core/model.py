"""What is asked of a model, our own Vision Transformer (core.vit) or a module of others (core.foreign)."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from core import vit
from core.foreign import fit as fitting
from core.foreign import forward as running
from core.foreign import model as foreign
from core.foreign.model import Foreign
from core.initializers import draw
from core.layers import EXACT
from core.ops import Ops, Parameter, Params
from core.vit import Output, VitConfig

Config = VitConfig | Foreign
Forward = Callable[[Params, Tensor, Tensor | None], Output]


def fit(ops: Ops, config: Config) -> Ops:
    """The transforms as the model takes them; InputError for those that it cannot."""
    return fitting.fit(ops, config) if isinstance(config, Foreign) else ops


def layout(config: Config, ops: Ops = EXACT) -> dict[str, Parameter]:
    """Every trained parameter in the model's order, those that transforms bring at the end."""
    return foreign.layout(config, ops) if isinstance(config, Foreign) else vit.layout(config, ops)


def shapes(config: Config, ops: Ops = EXACT) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the model's order."""
    return {name: p.shape for name, p in layout(config, ops).items()}


def parameters(config: Config, ops: Ops = EXACT) -> int:
    """Number of parameters."""
    return sum(prod(shape) for shape in shapes(config, ops).values())


def init(config: Config, seed: int, ops: Ops = EXACT) -> Params:
    """Initial parameters, float32, on the CPU: of our own model see `vit.init`; a module's are its own, made with
    torch's generator at this seed, and those that transforms bring are drawn as ours are."""
    if not isinstance(config, Foreign):
        return vit.init(config, seed, ops)
    return foreign.trained(config.build(seed)) | draw(ops.parameters(config.shape), seed)  # type: ignore[arg-type]


def asked(config: Config, ops: Ops) -> Config:
    """The config as the transforms want it."""
    return config if isinstance(config, Foreign) else ops.config(config)


def described(config: Config) -> dict[str, Any]:
    """A config's values, for a checkpoint."""
    return config.shape._asdict() if isinstance(config, Foreign) else vars(config)


def from_state_dict(config: Config, state: Params) -> Params:
    """The parameters of what `state_dict` gave."""
    if not isinstance(config, Foreign):
        return state
    other = config.module.state_dict().keys() - foreign.trained(config.module).keys()
    return {name: tensor for name, tensor in state.items() if name not in other}


def state_dict(config: Config, params: Params) -> Params:
    """What is saved of a model: of a module what its load_state_dict takes, and what transforms brought."""
    return params | foreign.state_dict(config, params) if isinstance(config, Foreign) else params


def of_blocks(config: Config) -> tuple[str, ...]:
    """How the names begin of parameters that reach the forward pass by the function of a block, see `bind`."""
    return () if isinstance(config, Foreign) else ("blocks.",)


def bind(
    config: Config,
    ops: Ops,
    dtype: torch.dtype | None = None,
    region: Callable[..., Any] = lambda block: block,
) -> Forward:
    """(params, normalised images [B,C,H,W], key) -> Output, the forward pass in `dtype`, the parameters' if not given.
    Without a key nothing is random.

    region: a compiler's mark on the function of a block of our own model, to compile it once for all.
    """
    if isinstance(config, Foreign):
        return lambda params, images, key: Output(*running.forward(params, images, config, ops, key, dtype))
    run = None if dtype is None else region(vit.blockwise(config, ops, dtype))
    return lambda params, images, key: vit.forward(params, images, config, ops, key, dtype, run)
