"""A module of others as a pure function of its parameters, its calls of torch made the primitives of core.ops.

torch.func.functional_call gives it parameters and buffers; a TorchFunctionMode takes its F.linear, F.layer_norm and
F.scaled_dot_product_attention to `linear`, `norm` and `attend`, and what F.layer_norm or F.gelu computed just before a
map to that map's `before`. What the last map of a branch gives goes through `attention` or `mlp`, and F.conv2d of
patches to `tokenize`. Keys are of the parameters' names. With no transform, and norms of the model's own precision,
every call is the module's own, and costs what it costs there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from core import rng
from core.errors import InputError
from core.foreign.model import Foreign, split
from core.foreign.places import (
    CONVOLUTIONS,
    Place,
    attention_inputs,
    linear_arguments,
    norm_arguments,
    plain_attention,
)
from core.layers import EXACT, normalize
from core.ops import Carry, Ops, Params, Site

PLAIN = replace(
    EXACT,
    attend=lambda site, q, k, v: F.scaled_dot_product_attention(q, k, v),
    attention=lambda site, branch: (branch, {}),
    mlp=lambda site, branch: branch,
)
"""The primitives as a module calls them: the branches once they are computed."""
PATCHES = ("patch_embed.proj.weight", "patch_embed.proj.bias")
TOKENS = ("cls_token", "pos_embed", *PATCHES)
"""Parameters of a tokenizer like our own."""


def forward(
    params: Params, images: Tensor, config: Foreign, ops: Ops, key: Tensor | None, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Normalised images [B,C,H,W] -> logits [B,K], and the blocks' penalties summed; `ops` are those of `fit`.

    dtype: of everything but LayerNorms, which compute in the parameters'; theirs if not given.
    """
    wide = next(iter(params.values())).dtype
    dtype = dtype or wide
    own = {name: params[name] for name in config.ours}
    held = {name: t.to(images.device) for name, t in config.held.items()}
    norms = {f"{n}.{kind}" for n, p in config.places.items() for kind in ("weight", "bias") if p.kind == "norm"}
    tensors = {
        name: t.to(wide if name in norms else dtype) if t.is_floating_point() else t
        for name, t in {**held, **own}.items()
    }
    brought: dict[int | None, Params] = {}
    for name in params:
        if name not in own:
            block, rest = split(name)
            brought.setdefault(block, {})[rest] = params[name]
    mode = _Primitives(config, tensors, brought, ops, key, dtype, images)
    if "tokenize" in mode.changed:  # whose tokens have their positions
        tensors["pos_embed"] = torch.zeros_like(tensors["pos_embed"][:, :1])
    with mode if mode.changed or dtype != wide else nullcontext():
        output = functional_call(config.module, tensors, (images.to(dtype),))
    return output if isinstance(output, Tensor) else output.logits, mode.penalty


class _Primitives(TorchFunctionMode):
    """Takes the module's calls to the primitives of `ops`. What these call themselves is left alone: under a compiler
    it would come here again."""

    def __init__(
        self,
        config: Foreign,
        tensors: Params,
        brought: Mapping[int | None, Params],
        ops: Ops,
        key: Tensor | None,
        dtype: torch.dtype,
        images: Tensor,
    ) -> None:
        super().__init__()
        self.places = [(tensors[f"{name}.weight"], name, place) for name, place in config.places.items()]
        self.config, self.tensors, self.images = config, tensors, images
        self.brought, self.ops, self.key, self.dtype = brought, ops, key, dtype
        self.changed = {primitive for part in ops.parts for primitive in (*part.replace, *part.wrap)}
        self.penalty = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=self.places[0][0].device)
        self.carry: Carry = {}
        self.inside = False
        self.last: tuple[str, Place] | None = None  # what was read last
        self.fresh: list[Tensor] = []  # what a norm or GELU gave last, if no other came after it,
        self.before: tuple[Callable[..., Tensor], tuple[Tensor, ...]] | None = None  # and of what

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reach = None if self.inside else _REACH.get(func)
        if reach is None:
            return func(*args, **kwargs)
        self.inside = True
        out = reach(self, func, *args, **kwargs)
        self.inside = False
        return out

    def linear(self, func: Any, /, *args: Any, **kwargs: Any) -> Tensor:
        x, weight, bias = linear_arguments(*args, **kwargs)
        found = self._find(weight)
        if found is None:
            return func(*args, **kwargs)
        self.last = found
        y = self._map(found, x, weight, bias) if "linear" in self.changed else func(*args, **kwargs)
        return self._branch(found[1], y) if found[1].ends in self.changed else y

    def _map(self, found: tuple[str, Place], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        given = weight.new_zeros(weight.shape[0]) if bias is None else bias
        site = self._site(*found, weight, given)
        if not (of := found[1].of):
            return self.ops.linear(site, lambda x: x, x)
        if self.before is None or not self.fresh or self.fresh[0] is not x:
            raise InputError(
                f"{self.config.name} changes a {_OF_WHAT[of]}'s output before {found[0]}, and transforms of linear "
                "maps rely on it; pass --engine eager, or leave them out"
            )
        function, inputs = self.before
        fresh = self.fresh

        def before(*again: Tensor) -> Tensor:
            known = fresh and all(a is b for a, b in zip(again, inputs, strict=True))
            return fresh[0] if known else function(*again)

        return self.ops.linear(site, before, *inputs)

    def _branch(self, place: Place, y: Tensor) -> Tensor:
        site = self._site(f"blocks.{place.block}", place._replace(role=""))
        return self.ops.attention(site, y)[0] if place.ends == "attention" else self.ops.mlp(site, y)

    def convolution(self, func: Any, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.last = self._find(weight) or self.last
        if "tokenize" not in self.changed or weight is not self.tensors[PATCHES[0]]:
            return func(input, weight, *args, **kwargs)
        own = {name: self.tensors[name] for name in TOKENS}
        site = Site("", own, self.config.shape, self.ops, self.key, self.dtype, {})  # type: ignore[arg-type]
        return self.ops.tokenize(site, self.images)[:, 1:].mT[..., None]  # the module adds its class token

    def norm(self, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        x, weight, bias, _ = norm_arguments(*args, **kwargs)
        if weight is None or bias is None or (found := self._find(weight)) is None:
            return func(*args, **kwargs)
        self.last = found
        if "norm" not in self.changed:  # no key is made for nothing
            eps = found[1].config.eps
            return self._remember(lambda x, weight, bias: normalize(x, weight, bias, eps), x, weight, bias)
        site = self._site(*found, weight, bias)
        return self._remember(lambda *inputs: self.ops.norm(site, *inputs), x, weight, bias)

    def gelu(self, func: Any, input: Tensor, **kwargs: Any) -> Tensor:
        return self._remember(lambda x: _of_rows(lambda x: func(x, **kwargs), x), input)

    def attend(self, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        self._forget()
        plain = plain_attention(*args, **kwargs)
        if self.last is None or self.last[1].block is None or not {"attend", "observe", "penalty"} & self.changed:
            return func(*args, **kwargs)
        name, place = self.last
        site = self._site(f"{name} attention", place._replace(role="attn"))
        heads = self.ops.attend(site, *plain) if plain and "attend" in self.changed else func(*args, **kwargs)
        if {"observe", "penalty"} & self.changed:
            self.carry = self.ops.observe(site, *attention_inputs(*args, **kwargs), heads)
            self.penalty = self.penalty + self.carry.pop("penalty")
        return heads

    def _find(self, weight: Tensor) -> tuple[str, Place] | None:
        return next(((name, place) for tensor, name, place in self.places if tensor is weight), None)

    def _site(self, name: str, place: Place, weight: Tensor | None = None, bias: Tensor | None = None) -> Site:
        params = dict(self.brought.get(place.block, {}))
        if weight is not None and bias is not None:
            params |= {f"{place.role}.weight": weight, f"{place.role}.bias": bias}
        keys = None if self.key is None else rng.named(self.key, name)
        return Site(place.role, params, place.config, self.ops, keys, self.dtype, self.carry, place.block)  # type: ignore[arg-type]

    def _remember(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        self._forget()
        out = function(*inputs)
        if "linear" in self.changed:
            self.fresh, self.before = [out], (function, inputs)
        return out

    def _forget(self) -> None:
        self.fresh.clear()
        self.fresh, self.before = [], None


def _of_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x [B,N,D]) of every row, of one where all are that one expanded."""
    return function(x) if x.dim() != 3 or x.stride(1) else function(x[:, :1]).expand(x.shape)


def _dropout(
    self: _Primitives, func: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """The very input where nothing is dropped: a compiler would take it for another tensor."""
    return func(input, p, training, inplace) if training and p else input


_OF_WHAT = {"norm": "LayerNorm", "gelu": "GELU"}
_REACH: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys(CONVOLUTIONS, _Primitives.convolution),
    F.dropout: _dropout,
    F.linear: _Primitives.linear,
    F.layer_norm: _Primitives.norm,
    F.gelu: _Primitives.gelu,
    F.scaled_dot_product_attention: _Primitives.attend,
}
