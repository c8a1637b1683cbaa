"""Transforms as a module of others takes them, or their refusal by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from core.errors import InputError
from core.foreign.model import Foreign, split
from core.layers import EXACT
from core.ops import SITES, Ops, Params, Part, Site, composed
from core.optimizers import Optimizer

REACHED = ("linear", "norm", "attend", "observe", "penalty")


def fit(ops: Ops, config: Foreign) -> Ops:
    """The transforms as this module takes them: over its own attention, asked about parameters by our names.

    Raises InputError for a transform of something that the module's calls of torch do not show.
    """
    for part in ops.parts:
        _refuse(part, config)
    exact = replace(EXACT, attend=_fused)
    return composed(exact, tuple(_renamed(part, config.ours) for part in ops.parts))


def _renamed(part: Part, ours: Mapping[str, str]) -> Part:
    """The part, asked about parameters by our names."""
    frozen, optimizer = part.frozen, part.optimizer
    return replace(
        part,
        frozen=frozen and (lambda name: frozen(ours.get(name, name))),
        optimizer=optimizer and (lambda rest: _Renamed(optimizer(rest), ours)),
    )


class _Renamed(NamedTuple):
    """An optimizer that sees parameters by our names."""

    inner: Optimizer
    ours: Mapping[str, str]

    def init(self, params: Params) -> Any:
        """Of the other."""
        return self.inner.init(self._renamed(params))

    def update(self, params: Params, gradients: Params, state: Any, step: Tensor) -> tuple[Params, Any]:
        """Of the other."""
        new, state = self.inner.update(self._renamed(params), self._renamed(gradients), state, step)
        return {name: new[self.ours.get(name, name)] for name in params}, state

    @property
    def learning_rate(self) -> float:
        """Of the other."""
        return self.inner.learning_rate

    def rate(self, step: Tensor) -> Tensor:
        """Of the other."""
        return self.inner.rate(step)

    def _renamed(self, tree: Params) -> Params:
        return {self.ours.get(name, name): tensor for name, tensor in tree.items()}


def _fused(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _refuse(part: Part, config: Foreign) -> None:
    changed = (*part.replace, *part.wrap)
    hidden = [primitive for primitive in changed if primitive not in REACHED] + ["config"] * (part.config is not None)
    hidden += ["block"] * (part.plan is not None)
    instead = "leave it out, or use our own model (without --model)"
    if hidden:
        raise InputError(f"{part.name} changes the model's {hidden[0]}, which is not reached in {config}; {instead}")
    if "attend" in changed and not config.reached["attend"]:
        masked = f" (it has {config.reached['masked']} with a mask)" if config.reached["masked"] else ""
        raise InputError(
            f"{part.name} changes the model's attend, and {config} calls no plain F.scaled_dot_product_attention"
            f"{masked}; {instead}"
        )
    if {"observe", "penalty"} & {*changed} and not config.reached["attend"] + config.reached["masked"]:
        raise InputError(f"{part.name} reads attention heads, and {config} shows none; {instead}")
    roles = Counter((place.block, place.role) for place in config.places.values())
    if {"linear", "norm"} & {*changed} and part.at is not None and not {role for _, role in roles} & {*part.at}:
        raise InputError(f"{part.name} changes {', '.join(part.at)}, and {config} has none of them; {instead}")
    for name in part.parameters(config.shape) if part.parameters else ():  # type: ignore[arg-type]
        block, rest = split(name)
        role = next((role for role in SITES if rest.startswith(f"{role}.")), None)
        if block is None or roles[block, role] != 1 if role else not rest.startswith("attn."):
            raise InputError(f"{part.name} brings {name}, for which {config} has no single map or norm; {instead}")
