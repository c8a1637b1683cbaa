"""A module of others: its parameters, and what is known of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from core.foreign.places import Place, Shape
from core.layers import EXACT
from core.ops import Ops, Parameter, Params, joined


@dataclass(frozen=True, eq=False)
class Foreign:
    """A module of others: what it is called, its shape, and where its calls stand by the parameters they read.

    build: the module anew, its initial values by a seed. module: one, in evaluation mode. ours: its parameters by our
    names. held: its `constants`. reached: how many maps, norms, attentions and masked attentions of its own parameters
    a forward pass has.
    """

    name: str
    shape: Shape
    module: nn.Module
    build: Callable[[int], nn.Module]
    places: Mapping[str, Place]
    ours: Mapping[str, str]
    held: Params
    reached: Counter[str]

    @property
    def image(self) -> int:
        """Side in pixels."""
        return self.shape.image

    @property
    def channels(self) -> int:
        """Of an image."""
        return self.shape.channels

    @property
    def depth(self) -> int:
        """Blocks."""
        return self.shape.depth

    def __str__(self) -> str:
        return self.name

    @property
    def sentence(self) -> str:
        """What transforms can reach of it."""
        masked = f" and {self.reached['masked']} masked" if self.reached["masked"] else ""
        return (
            f"{self.name}: transforms reach {self.reached['linear']} linear maps, {self.reached['norm']} LayerNorms "
            f"and {self.reached['attend']}{masked} attentions in {self.depth} blocks"
        )


def trained(module: nn.Module) -> Params:
    """The parameters that a module trains, by name."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def constants(module: nn.Module) -> Params:
    """What else it computes with: buffers, and parameters that it does not train."""
    return {
        **dict(module.named_buffers()),
        **{n: p.detach() for n, p in module.named_parameters() if not p.requires_grad},
    }


def layout(config: Foreign, ops: Ops = EXACT) -> dict[str, Parameter]:
    """Every trained parameter (the initial values are the module's own), then those that transforms bring."""
    own = {name: Parameter(tuple(p.shape)) for name, p in trained(config.module).items()}
    return joined(own, ops.parameters(config.shape))  # type: ignore[arg-type]


def state_dict(config: Foreign, params: Params) -> Params:
    """What the module's load_state_dict takes, from parameters."""
    every = config.held | params
    first = {id(p): name for name, p in config.module.named_parameters()}  # a shared one has more names
    own = {name: first.get(id(t), name) for name, t in config.module.state_dict(keep_vars=True).items()}
    return {name: every[of].clone() if of != name else every[of] for name, of in own.items() if of in every}


def split(name: str) -> tuple[int | None, str]:
    """Block and name in it of a parameter that a transform brings."""
    if not name.startswith("blocks."):
        return None, name
    _, number, rest = name.split(".", 2)
    return int(number), rest
