"""Optimizers as pure functions over parameters by name: `init` makes a state, `update` the next of both."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from core.errors import InputError, choose
from core.ops import Ops, Params

SCHEDULES = ("constant", "cosine")


class Optimizer(Protocol):
    """What a step needs of an optimizer; `state` is any nest of tensors. step: updates done before, 0-d int64."""

    def __hash__(self) -> int: ...

    @property
    def learning_rate(self) -> float:
        """The largest rate of its schedule."""

    def init(self, params: Params) -> Any:
        """The state before the first update."""

    def update(self, params: Params, gradients: Params, state: Any, step: Tensor) -> tuple[Params, Any]:
        """The next parameters and state."""

    def rate(self, step: Tensor) -> Tensor:
        """The learning rate of the next update, 0-d float64."""


class Moments(NamedTuple):
    """AdamW's first and second moments by parameter."""

    mean: Params
    square: Params


@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov and Hutter, ICLR 2019, algorithm 2), torch.optim.AdamW's update and defaults.

    schedule: "constant", or "cosine" to zero at `steps`; both after a linear warm-up over `warmup` steps.
    decay_all: decay every parameter, as torch does by default; else matrices only (no biases, norms,
        class token and positions).
    """

    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decay_all: bool = True
    schedule: str = "constant"
    warmup: int = 0
    steps: int = 1

    def __post_init__(self) -> None:
        choose("schedule", self.schedule, SCHEDULES)
        if not 0 < self.learning_rate < float("inf"):
            raise InputError(f"learning rate {self.learning_rate} must be finite and above 0")
        if not 0 <= self.weight_decay < float("inf"):
            raise InputError(f"weight decay {self.weight_decay} must be finite and 0 or above")
        if self.schedule == "cosine" and not 0 <= self.warmup < self.steps:
            raise InputError(f"warm-up of {self.warmup} steps must be shorter than the {self.steps} of the run")

    def rate(self, step: Tensor) -> Tensor:
        """Learning rate of the update that follows `step` finished ones, 0-d float64."""
        done = step.double()
        scale = ((done + 1) / max(self.warmup, 1)).clamp(max=1)
        if self.schedule == "cosine":
            progress = ((done - self.warmup) / (self.steps - self.warmup)).clamp(0, 1)
            scale = scale * (1 + torch.cos(torch.pi * progress)) / 2
        return self.learning_rate * scale

    def decays(self, name: str) -> bool:
        """Whether weight decay acts on the parameter of this name."""
        return self.decay_all or (name.endswith("weight") and "norm" not in name)

    def init(self, params: Params) -> Moments:
        """Zeros."""
        return Moments(*({name: torch.zeros_like(p) for name, p in params.items()} for _ in range(2)))

    def update(self, params: Params, gradients: Params, state: Moments, step: Tensor) -> tuple[Params, Moments]:
        """One update, a group of parameters at a time."""
        rate, done = self.rate(step), step.double() + 1
        root, scale = (1 - self.beta2**done).sqrt(), rate / (1 - self.beta1**done)
        kept = 1 - rate * self.weight_decay
        out: tuple[Params, Params, Params] = {}, {}, {}
        for names in _groups(params):
            p, g, m, v = ([tree[name] for name in names] for tree in (params, gradients, state.mean, state.square))
            first = torch._foreach_lerp(m, g, 1 - self.beta1)
            second = torch._foreach_addcmul(torch._foreach_mul(v, self.beta2), g, g, value=1 - self.beta2)
            change = torch._foreach_sqrt(second)
            torch._foreach_div_(change, root.to(p[0].dtype))  # of another type it would be one launch a tensor
            torch._foreach_add_(change, self.eps)
            torch._foreach_reciprocal_(change)
            torch._foreach_mul_(change, first)
            torch._foreach_mul_(change, scale.to(p[0].dtype))
            decayed = [old * kept if self.decays(name) else old for name, old in zip(names, p, strict=True)]
            for tree, tensors in zip(out, (torch._foreach_sub(decayed, change), first, second), strict=True):
                tree.update(zip(names, tensors, strict=True))
        return out[0], Moments(*out[1:])


class Followed(NamedTuple):
    """An optimizer's state, and the average of the parameters that it has made."""

    inner: Any
    average: Params


@dataclass(frozen=True)
class Around:
    """What is another optimizer's of one around it: its rates."""

    inner: Optimizer

    @property
    def learning_rate(self) -> float:
        """The other's."""
        return self.inner.learning_rate

    def rate(self, step: Tensor) -> Tensor:
        """The other's."""
        return self.inner.rate(step)


@dataclass(frozen=True)
class Averaged(Around):
    """An optimizer that keeps an exponential moving average of the parameters as well (Polyak and Juditsky, SIAM J.
    Control Optim. 30, 1992), as timm's ModelEmaV3: after the first update the parameters themselves.

    decay: the share of the average that an update leaves; InputError outside 0 to below 1. warmup: after n updates
    1 - n^(-2/3), while that is less.
    """

    decay: float
    warmup: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise InputError(f"ema {self.decay} is outside 0 to below 1: it is the share that is left, such as 0.9998")

    def init(self, params: Params) -> Followed:
        """The other's, and the parameters."""
        return Followed(self.inner.init(params), {name: p.clone() for name, p in params.items()})

    def update(self, params: Params, gradients: Params, state: Followed, step: Tensor) -> tuple[Params, Followed]:
        """One update, then the average's."""
        params, inner = self.inner.update(params, gradients, state.inner, step)
        weight = ((step + 1).double() ** (-2 / 3) if self.warmup else (step == 0).double()).clamp(min=1 - self.decay)
        average: Params = {}
        for names in _groups(params):
            old, new = ([tree[name] for name in names] for tree in (state.average, params))
            change = torch._foreach_sub(new, old)
            torch._foreach_mul_(change, weight.to(new[0].dtype))
            torch._foreach_add_(change, old)
            average.update(zip(names, change, strict=True))
        return params, Followed(inner, average)


@dataclass(frozen=True)
class Clipped(Around):
    """An optimizer of gradients that are scaled down to the global norm `largest` if theirs is above it (Pascanu et
    al., ICML 2013), as torch.nn.utils.clip_grad_norm_ does. norm: that of all from the norms [n] of a process's.

    Raises InputError for a norm that is not finite or not above 0.
    """

    largest: float
    norm: Callable[[Tensor], Tensor] = Tensor.norm

    def __post_init__(self) -> None:
        if not 0 < self.largest < float("inf"):
            raise InputError(f"clip {self.largest} must be finite and above 0, or None")

    def init(self, params: Params) -> Any:
        """The other's."""
        return self.inner.init(params)

    def update(self, params: Params, gradients: Params, state: Any, step: Tensor) -> tuple[Params, Any]:
        """The other's, of the clipped gradients."""
        tensors = list(gradients.values())
        scale = (self.largest / (self.norm(torch.stack(torch._foreach_norm(tensors))) + 1e-6)).clamp(max=1)
        clipped = dict(zip(gradients, torch._foreach_mul(tensors, scale), strict=True))
        return self.inner.update(params, clipped, state, step)


def changed(optimizer: Optimizer, ops: Ops) -> Optimizer:
    """The optimizer as `ops` want it: what they make of it is averaged, and takes clipped gradients, as it was."""
    if isinstance(optimizer, Averaged | Clipped):
        return replace(optimizer, inner=changed(optimizer.inner, ops))
    return ops.optimizer(optimizer)


def _groups(params: Params) -> list[list[str]]:
    """Names in order, cut after each 2^18 elements: few launches for small tensors, temporaries that fit a cache."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, p in params.items():
        if size >= 1 << 18:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += p.numel()
    return groups
