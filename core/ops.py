"""The seam: the few primitives that a Vision Transformer is written in, and how transforms of them compose.

A training optimization is a pure function Ops -> Ops, made by `rewrite`: it replaces primitives, wraps them, or brings
parameters, frozen ones, an optimizer. The model never knows which. EXACT, the unmodified primitives, is in core.layers.
Axis letters: B batch, N tokens, D width, h heads, d head width, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from core import rng
from core.errors import InputError, choose

if TYPE_CHECKING:
    import torch

    from core.account.step import Account
    from core.optimizers import Optimizer
    from core.vit import VitConfig

Params = dict[str, Tensor]
# What leaves a block beside the tokens: its "penalty", and what transforms hand to the next.
Carry = dict[str, Tensor]


class Site(NamedTuple):
    """Where in the model a primitive is called.

    name: "norm", "head"; within a block without its number: "attn.qkv"; "" for a block, or the model.
    params: those of the block (by their names in it), or of all that is outside the blocks.
    keys: what keys are made from, see `key`; None where nothing may be random.
    dtype: what the model computes in.
    carry: what the blocks before left. block: the block's number, where a transform is `positional`, else None: all
        such blocks are the same function, and are compiled once.
    """

    name: str
    params: Params
    config: VitConfig
    ops: Ops
    keys: Tensor | None
    dtype: torch.dtype
    carry: Carry
    block: int | None = None

    def child(self, name: str) -> Site:
        """The site of this name below."""
        full = f"{self.name}.{name}" if self.name else name
        return Site(full, self.params, self.config, self.ops, self.keys, self.dtype, self.carry, self.block)

    def key(self, purpose: str) -> Tensor | None:
        """The key [2] of this name for a purpose, such as "dropout"; None where nothing may be random. Other sites and
        purposes have other keys, whatever else is drawn."""
        return None if self.keys is None else rng.named(self.keys, f"{self.name} {purpose}")

    def affine(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The weight and the bias of this layer, in `dtype` if given."""
        weight, bias = self.params[f"{self.name}.weight"], self.params[f"{self.name}.bias"]
        return (weight, bias) if dtype is None else (weight.to(dtype), bias.to(dtype))


class Parameter(NamedTuple):
    """A parameter's shape, and its initial value: a constant, or made of uniform draws in [0, 1) of this shape."""

    shape: tuple[int, ...]
    initial: float | Callable[[Tensor], Tensor] = 0.0


@dataclass(frozen=True)
class Ops:
    """The primitives, each a function of the site where it is called, and the parts that they are composed of.

    tokenize:  (site, images [B,C,H,W]) -> tokens [B,N,D], class token and positions included
    norm:      (site, x [...,D], weight [D], bias [D]) -> [...,D]
    linear:    (site, before, *inputs) -> before(*inputs) W^T + b, W and b those of the site; wrappers hand on both
    attend:    (site, q, k, v [B,h,N,d]) -> heads [B,h,N,d]
    attention: (site, x [B,N,D]) -> ([B,N,D], carry): the first branch, norm included, residual not
    mlp:       (site, x [B,N,D]) -> [B,N,D]: the second branch, likewise
    block:     (site, x [B,N,D]) -> (x [B,N,D], carry): both branches with their residuals
    readout:   (site, x [B,N,D]) -> logits [B,K]
    observe:   (site, q, k, v, heads) -> carry: what leaves the block beside the tokens, its penalty in any case
    penalty:   (site, heads [B,h,N,d]) -> what one block adds to the cross entropy, a scalar
    """

    tokenize: Callable[[Site, Tensor], Tensor]
    norm: Callable[[Site, Tensor, Tensor, Tensor], Tensor]
    linear: Callable[..., Tensor]
    attend: Callable[[Site, Tensor, Tensor, Tensor], Tensor]
    attention: Callable[[Site, Tensor], tuple[Tensor, Carry]]
    mlp: Callable[[Site, Tensor], Tensor]
    block: Callable[[Site, Tensor], tuple[Tensor, Carry]]
    readout: Callable[[Site, Tensor], Tensor]
    observe: Callable[[Site, Tensor, Tensor, Tensor, Tensor], Carry]
    penalty: Callable[[Site, Tensor], Tensor]
    parts: tuple[Part, ...] = ()
    exact: Ops | None = field(default=None, repr=False)

    def replaces(self, primitive: str) -> bool:
        """Whether a transform replaces this primitive, somewhere at least."""
        return any(primitive in part.replace for part in self.parts)

    @property
    def observed(self) -> bool:
        """Whether a transform looks at what attention computes on the way, such as one with a penalty on heads."""
        return any({"observe", "penalty"} & (part.replace.keys() | part.wrap.keys()) for part in self.parts)

    def number(self, block: int, depth: int) -> int | None:
        """The number of a block of `depth`, if a transform asks for it, else None."""
        asked = [part.positional for part in self.parts]
        return block if any(p is True or (p and {block, block - depth} & set(p)) for p in asked) else None

    def alike(self, depth: int) -> bool:
        """Whether all blocks of `depth` but the first and the last are the same function."""
        return all(self.number(block, depth) is None for block in range(1, depth - 1))

    def config(self, config: VitConfig) -> VitConfig:
        """The model's config as the transforms want it; InputError where two want different values of a field."""
        changes: dict[str, tuple[str, Any]] = {}
        for part in self.parts:
            wanted = part.config(config) if part.config else config
            for name in (f.name for f in fields(config)):
                value = getattr(wanted, name)
                if value == getattr(config, name):
                    continue
                first, other = changes.setdefault(name, (part.name, value))
                if other != value:
                    raise InputError(f"{first} wants {name}={other} and {part.name} {name}={value}; choose one")
        return replace(config, **{name: value for name, (_, value) in changes.items()})

    def parameters(self, config: VitConfig) -> dict[str, Parameter]:
        """Parameters that transforms add to the model's, by full name, which contains the transform's."""
        out: dict[str, Parameter] = {}
        for part in self.parts:
            own = part.parameters(config) if part.parameters else {}
            for name, p in own.items():
                if not isinstance(p, Parameter) or not all(isinstance(n, int) and n >= 0 for n in p.shape):
                    raise InputError(f"{part.name} brings {name} as {p}; write Parameter(shape, initial)")
                if part.name not in name:
                    raise InputError(f"{part.name} brings {name}: such a name contains the transform's own; rename it")
            out |= own
        return out

    def frozen(self, name: str) -> bool:
        """Whether the parameter of this full name is not trained. A transform freezes no parameter of another one."""
        owners = [part for part in self.parts if part.parameters and part.name in name]
        return any(part.frozen(name) for part in owners or self.parts if part.frozen)

    def optimizer(self, optimizer: Optimizer) -> Optimizer:
        """The optimizer as the transforms want it."""
        return reduce(lambda o, part: part.optimizer(o) if part.optimizer else o, self.parts, optimizer)

    def planned(self, config: VitConfig, cost: Cost) -> Ops:
        """These with the plans of the transforms that make one, in place of what they are without."""
        ops = self
        for part in self.parts:
            if part.plan:
                rest = composed(self.exact or self, tuple(p for p in ops.parts if p is not part))
                ops = part.plan(rest, config, cost)
        return ops


def joined(own: Mapping[str, Parameter], brought: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """A model's parameters, then those that transforms bring; InputError for one that both have."""
    if taken := [name for name in brought if name in own]:
        raise InputError(f"a transform brings {taken[0]}, which the model has; give it another name")
    return {**own, **brought}


Rewrite = Callable[[Ops], Ops]
Cost = Callable[[Ops, "VitConfig"], "Account"]
Plan = Callable[[Ops, "VitConfig", Cost], Ops]


@dataclass(frozen=True, eq=False)
class Part:
    """What one transform does, see `rewrite`."""

    name: str
    replace: Mapping[str, Callable[..., Any]]
    wrap: Mapping[str, Callable[..., Any]]
    at: Collection[str] | None
    inside: Collection[str]
    innermost: bool
    positional: bool | Collection[int]
    config: Callable[[VitConfig], VitConfig] | None
    parameters: Callable[[VitConfig], dict[str, Parameter]] | None
    frozen: Callable[[str], bool] | None
    optimizer: Callable[[Optimizer], Optimizer] | None
    plan: Plan | None

    def places(self, primitive: str) -> Collection[str] | None:
        """Names of the sites where this transform changes a primitive; None: wherever it is called."""
        return self.at if primitive in _PLACED else None


_PLACED = ("linear", "norm")  # called at several sites of a block
PRIMITIVES = ("tokenize", "norm", "linear", "attend", "attention", "mlp", "block", "readout", "observe", "penalty")
SITES = (  # where these are called
    *("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"),
    *("patch_embed.norm", "norm", "head", "head.fc1", "head.fc2"),
)


def rewrite(
    name: str,
    replace: Mapping[str, Callable[..., Any]] | None = None,
    wrap: Mapping[str, Callable[..., Any]] | None = None,
    at: Collection[str] | None = None,
    inside: Collection[str] = (),
    innermost: bool = False,
    positional: bool | Collection[int] = False,
    config: Callable[[VitConfig], VitConfig] | None = None,
    parameters: Callable[[VitConfig], dict[str, Parameter]] | None = None,
    frozen: Callable[[str], bool] | None = None,
    optimizer: Callable[[Optimizer], Optimizer] | None = None,
    plan: Plan | None = None,
) -> Rewrite:
    """A transform: the function Ops -> Ops of these changes. In whatever order transforms are applied, replacements are
    inside, wrappers around them: those declared innermost first, the others in any order (by name).

    name: the transform's, for messages; part of the name of each parameter that it brings.
    replace: a new function by primitive, called like it.
    wrap: functions by primitive, called with what they wrap first: `def mlp(inner, site, x)`.
    at: names of the sites at which linear and norm are changed; None: all.
    inside: what a replacement does by itself, nobody else can change: sites (their linear or norm), or primitives.
    innermost: whether wrappers must see what the other wrappers have made of the inputs.
    positional: whether blocks differ, in what is read of `site.block` or in shapes; or those that do (negative: from
        the end).
    config, parameters, frozen, optimizer: see the methods of Ops; `optimizer` takes the one it may build on.
    plan: (ops without this transform, config, what tells the account of a step) -> ops with what it is to be for such a
        step. Who knows the batch asks for it (`Ops.planned`); the transform works without, too.

    Raises InputError for primitives and sites that the model does not have and, applied, where it and another one
    replace the same primitive at the same place, wrap it innermost, or both bring an optimizer.
    """
    for primitive in (*(replace or {}), *(wrap or {})):
        choose("primitive", primitive, PRIMITIVES)
    for place in at or ():
        choose("site", place, SITES)
    for place in inside:
        choose("site or primitive", place, (*SITES, *PRIMITIVES))
    part = Part(
        *(name, replace or {}, wrap or {}, at, inside, innermost, positional),
        *(config, parameters, frozen, optimizer, plan),
    )

    def apply(ops: Ops) -> Ops:
        for other in ops.parts:
            _refuse_conflicts(*sorted((part, other), key=lambda p: p.name))
        return composed(ops.exact or ops, tuple(sorted((*ops.parts, part), key=lambda p: (not p.innermost, p.name))))

    return apply


def _refuse_conflicts(first: Part, second: Part) -> None:
    for primitive in first.replace.keys() & second.replace.keys():
        if _meet(first.places(primitive), second.places(primitive)):
            raise InputError(f"{first.name} and {second.name} both replace the model's {primitive}; choose one")
    for primitive in first.wrap.keys() & second.wrap.keys():
        if first.innermost and second.innermost and _meet(first.places(primitive), second.places(primitive)):
            raise InputError(f"{first.name} and {second.name} both wrap the model's {primitive} innermost; choose one")
    if first.optimizer and second.optimizer:
        raise InputError(f"{first.name} and {second.name} both bring an optimizer; choose one")
    for one, other in ((first, second), (second, first)):
        for primitive in other.replace.keys() | other.wrap.keys():
            placed = primitive in _PLACED and _meet([p for p in one.inside if p in SITES], other.places(primitive))
            if primitive in one.inside or placed:
                raise InputError(
                    f"{one.name} does the model's {primitive} at {', '.join(one.inside)} by itself, and {other.name} "
                    "changes it there; choose one"
                )


def _meet(first: Collection[str] | None, second: Collection[str] | None) -> bool:
    if first is None or second is None:
        return bool(first is None or first) and bool(second is None or second)
    return not set(first).isdisjoint(second)


def composed(exact: Ops, parts: tuple[Part, ...]) -> Ops:
    """EXACT with these parts, wrappers from the inside out."""
    functions: dict[str, Any] = {}
    for part in parts:
        for primitive, new in part.replace.items():
            old = functions.get(primitive, getattr(exact, primitive))
            functions[primitive] = _replaced(new, old, part.places(primitive))
    for part in parts:
        for primitive, new in part.wrap.items():
            old = functions.get(primitive, getattr(exact, primitive))
            functions[primitive] = _wrapped(new, old, part.places(primitive))
    return replace(exact, **functions, parts=parts, exact=exact)


def _replaced(new: Callable[..., Any], old: Callable[..., Any], at: Collection[str] | None) -> Callable[..., Any]:
    if at is None:
        return new
    return lambda site, *inputs: new(site, *inputs) if site.name in at else old(site, *inputs)


def _wrapped(new: Callable[..., Any], old: Callable[..., Any], at: Collection[str] | None) -> Callable[..., Any]:
    if at is None:
        return lambda site, *inputs: new(old, site, *inputs)
    return lambda site, *inputs: new(old, site, *inputs) if site.name in at else old(site, *inputs)
