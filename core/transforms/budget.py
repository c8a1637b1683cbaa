"""Exact recomputation chosen tensor by tensor, so that the peak of a step is at most a given size.

Chen et al. 2016, arXiv 1604.06174, with the byte account of core/account to choose by. Contract: exact. TENSORS of a
block can be rebuilt in the backward pass, each block its own; of all choices that fit, the plan (planning.py) computes
the fewest FLOPs again. (torch's activation_memory_budget is a share of what it may save, and not monotonic:
pytorch#197838.)
"""

from __future__ import annotations  # dynamo does not evaluate all annotations within a function

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from core import layers
from core.attached import attach
from core.errors import InputError, choose
from core.ops import Carry, Cost, Ops, Plan, Rewrite, Site, rewrite
from core.transforms.planning import Level, choose_plan, read_size
from core.transforms.recompute import after
from core.transforms.recompute import linear as rebuilt_input
from core.transforms.recompute import mlp as rebuilt_mlp

if TYPE_CHECKING:
    from core.vit import VitConfig

TENSORS = ("norm1", "weights", "attention", "norm2", "gelu", "mlp", "block")
INPUTS = {"attn.qkv": "norm1", "mlp.fc1": "norm2", "mlp.fc2": "gelu"}  # what a map reads
MOST = ("attention", "mlp")
LEVELS: tuple[Level, ...] = (  # nothing of a branch beside all of it: dynamo cannot nest what is rebuilt
    *(
        first + second
        for first in ((), ("norm1",), ("norm1", "weights"), ("attention",))
        for second in ((), ("gelu",), ("norm2", "gelu"), ("mlp",))
    ),
    ("block",),
)


def budget(size: str = "0.5", plan: Sequence[Level] | None = None) -> Rewrite:
    """Rebuild what has to be, and nothing else, for a step whose peak is at most `size`.

    size: such as "3GB" or "2.5GiB"; or a share of the peak without this transform, such as "0.5". What is rebuilt is
        chosen when the step's batch is known (`core.account.step.planned`; a study does it for every arm), and a size
        that cannot be is refused then. Without that MOST is rebuilt in every block.
    plan: instead, what to rebuild, by block or once for all. norm1, norm2, gelu: the outputs of the LayerNorms and of
        GELU; weights: of attention, if it is not fused; attention, mlp: all of a branch; block: all but its input.

    Raises InputError for what is no size, and for unknown tensors.
    """
    read_size(size)
    if plan is not None and not (plan and isinstance(plan, tuple | list) and all(isinstance(p, tuple) for p in plan)):
        raise InputError(f"budget plan {plan!r} is no tuple of tuples of names; write for example (('norm1', 'gelu'),)")
    for name in (name for level in plan or () for name in level):
        choose("tensor of a budget's plan", str(name), TENSORS)

    def chosen(rest: Ops, config: VitConfig, cost: Cost) -> Ops:
        hidden = {"attention", "block"} if rest.observed else set()
        hidden |= {"weights"} if rest.replaces("attend") else set()
        levels = [level for level in LEVELS if not hidden & set(level)]
        few = replace(config, depth=2) if config.depth > 2 and rest.alike(config.depth) else config
        found = choose_plan(size, levels, config, few, lambda plan, config: cost(_rebuilding(plan)(rest), config))
        return _rebuilding(found)(rest)

    return _rebuilding([MOST], chosen) if plan is None else _rebuilding(plan)


def _rebuilding(plan: Sequence[Level], choice: Plan | None = None) -> Rewrite:
    def rebuilds(site: Site, name: str) -> bool:
        if len(plan) not in (1, site.config.depth):
            raise InputError(f"budget's plan is of {len(plan)} blocks, and the model has {site.config.depth}")
        return name in plan[(site.block or 0) % len(plan)]

    def linear(site: Site, before: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        exact = rebuilt_input if rebuilds(site, INPUTS[site.name]) else layers.linear
        return exact(site, before, *inputs)

    def mlp(site: Site, x: Tensor) -> Tensor:
        return rebuilt_mlp(site, x) if rebuilds(site, "mlp") else layers.mlp(site, x)

    def attend(inner: Callable[..., Tensor], site: Site, *inputs: Tensor) -> Tensor:
        fused = site.ops.replaces("attend")
        return inner(site, *inputs) if fused or not rebuilds(site, "weights") else rebuilt_weights(*inputs)

    def branch(name: str, foreign: tuple[str, ...]) -> Callable[..., tuple[Tensor, Carry]]:
        def run(inner: Callable[..., tuple[Tensor, Carry]], site: Site, x: Tensor) -> tuple[Tensor, Carry]:
            read = site.ops.observed or any(t.requires_grad for t in site.carry.values())
            return inner(site, x) if read or not rebuilds(site, name) else rebuilt(inner, site, x, foreign)

        return run

    return rewrite(
        "budget",
        replace={"linear": linear, "mlp": mlp},
        wrap={
            "attend": attend,
            "attention": branch("attention", foreign=("norm2.", "mlp.")),
            "block": branch("block", foreign=()),
        },
        at=tuple(INPUTS),
        inside=("norm2", "mlp.fc1", "mlp.fc2"),
        innermost=True,
        positional=len(set(plan)) > 1,
        plan=choice,
    )


def rebuilt(
    inner: Callable[..., tuple[Tensor, Carry]], site: Site, x: Tensor, foreign: tuple[str, ...]
) -> tuple[Tensor, Carry]:
    """inner(site, x) that keeps x alone. foreign: how the names begin of parameters that it does not read."""
    own = {name: t for name, t in site.params.items() if not name.startswith(foreign)}
    given = site.carry if site.keys is None else {**site.carry, "keys": site.keys}
    names, constants = list(own), list(given)
    bare = site._replace(params={}, keys=None, carry={})

    def run(x: Tensor, *tensors: Tensor) -> tuple[Tensor, Carry]:
        params = dict(zip(names, tensors[: len(names)], strict=True))
        carry = dict(zip(constants, tensors[len(names) :], strict=True))
        keys = carry.pop("keys", None)
        return inner(bare._replace(params=params, keys=keys, carry=carry), x)

    def gradient(G: Tensor, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        rest = tensors[len(names) :]
        _, pull, *_ = torch.func.vjp(lambda *inputs: run(*inputs, *rest)[0], *after(G, x, *tensors[: len(names)]))
        return pull(G)

    operands, kept = [x, *own.values()], [x, *own.values(), *given.values()]
    y, carry = run(*(t.detach() for t in kept))
    return attach(y, operands, kept, gradient), carry


def rebuilt_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt d) v that keeps q, k and v alone: all [B,h,N,d]."""
    scale = q.shape[-1] ** -0.5

    def weights(q: Tensor, k: Tensor) -> Tensor:
        return ((q * scale) @ k.mT).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))

    def gradient(G: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        w = weights(*after(G, q, k))
        of_v, of_scores = w.to(G.dtype).mT @ G, (G @ v.mT).to(w.dtype)
        of_scores = of_scores.sub_((of_scores * w).sum(-1, keepdim=True)).mul_(w).to(G.dtype)
        del w
        return of_scores @ k * scale, of_scores.mT @ q * scale, of_v

    return attach(weights(q.detach(), k.detach()).to(v.dtype) @ v.detach(), [q, k, v], [q, k, v], gradient)
