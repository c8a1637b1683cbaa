"""The training step as a pure function: step(state, batch) -> (state, metrics).

Loss and gradient through either of two differentiators, then AdamW. Nothing is mutated; randomness comes
from the key in the state and the step count. Only core.engine decides how the step is run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from core import rng
from core.errors import InputError, choose
from core.ops import Ops, Params
from core.vit import LAYERS, VitConfig, forward

DIFFERENTIATORS = ("autograd", "func")
SCHEDULES = ("constant", "cosine")

# images [B,C,H,W] as stored, labels [B], and if a transform remembers gradient norms, these by name (see `memory`)
Batch = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Params]


class State(NamedTuple):
    """Parameters, AdamW's first and second moments, steps done (0-d int64), key [2]."""

    params: Params
    mean: Params
    square: Params
    step: Tensor
    key: Tensor


class Metrics(NamedTuple):
    """0-d tensors: loss = cross_entropy + penalty (means over the batch), correct predictions, learning rate.

    norms: the batch's new gradient norms by name, where the batch brought old ones.
    """

    loss: Tensor
    cross_entropy: Tensor
    penalty: Tensor
    correct: Tensor
    learning_rate: Tensor
    norms: Params | None = None


class Aux(NamedTuple):
    """What the objective reports beside its value. Not detached in there: where the penalty is zero a compiler
    makes the value and the cross entropy one tensor, and a detached one would take the gradient from both."""

    cross_entropy: Tensor
    penalty: Tensor
    correct: Tensor


Prepare = Callable[[Tensor, Tensor | None], Tensor]  # (stored images, key) -> normalised float images
Objective = Callable[[Params, Batch, Tensor], tuple[Tensor, Aux]]
Step = Callable[[State, Batch], tuple[State, Metrics]]


@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov and Hutter, ICLR 2019, algorithm 2), torch.optim.AdamW's update and defaults.

    schedule: "constant", or "cosine" to zero at `steps`; both after a linear warm-up over `warmup` steps.
    decay_all: decay every parameter, as torch does by default; else matrices only (no biases, norms,
        class token and positions). clip: largest global norm of the gradients; None: any.
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
    clip: float | None = None

    def __post_init__(self) -> None:
        choose("schedule", self.schedule, SCHEDULES)
        if not 0 < self.learning_rate < float("inf"):
            raise InputError(f"learning rate {self.learning_rate} must be finite and above 0")
        if not 0 <= self.weight_decay < float("inf"):
            raise InputError(f"weight decay {self.weight_decay} must be finite and 0 or above")
        if self.clip is not None and not 0 < self.clip < float("inf"):
            raise InputError(f"clip {self.clip} must be finite and above 0, or None")
        if self.schedule == "cosine" and not 0 <= self.warmup < self.steps:
            raise InputError(f"warm-up of {self.warmup} steps must be shorter than the {self.steps} of the run")

    def rate(self, count: Tensor) -> Tensor:
        """Learning rate of the step that follows `count` finished ones, 0-d float64."""
        done = count.double()
        scale = ((done + 1) / max(self.warmup, 1)).clamp(max=1)
        if self.schedule == "cosine":
            progress = ((done - self.warmup) / (self.steps - self.warmup)).clamp(0, 1)
            scale = scale * (1 + torch.cos(torch.pi * progress)) / 2
        return self.learning_rate * scale

    def decays(self, name: str) -> bool:
        """Whether weight decay acts on the parameter of this name."""
        return self.decay_all or (name.endswith("weight") and "norm" not in name)


def start(params: Params, key: Tensor) -> State:
    """The state before the first step; takes the parameters detached."""
    params = {name: p.detach() for name, p in params.items()}
    device = next(iter(params.values())).device
    mean = {name: torch.zeros_like(p) for name, p in params.items()}
    square = {name: torch.zeros_like(p) for name, p in params.items()}
    return State(params, mean, square, torch.zeros((), dtype=torch.int64, device=device), key.to(device))


def memory(config: VitConfig, images: int, device: torch.device) -> Params:
    """Room for the gradient norms of every map's rows [images, N] by name, 0 (unknown) at first. The rows of a batch,
    by image index, are the third part of its Batch, and Metrics.norms replaces them."""
    maps = [f"blocks.{i}.{layer}.norms" for i in range(config.depth) for layer in LAYERS]
    return {name: torch.zeros(images, config.tokens, device=device) for name in maps}


def cast(params: Params, dtype: torch.dtype) -> Params:
    """Parameters in `dtype`, LayerNorm's in their own: norms stay in the precision of the master weights."""
    return {name: p if "norm" in name else p.to(dtype) for name, p in params.items()}


def objective(config: VitConfig, ops: Ops, prepare: Prepare, dtype: torch.dtype = torch.float32) -> Objective:
    """(params, batch, key) -> (cross entropy + penalty, Aux); the forward pass in `dtype`, the loss in float32.

    Augmentation and model draw from separate keys, so that all arms of a seed see the same images.
    """

    def loss(params: Params, batch: Batch, key: Tensor) -> tuple[Tensor, Aux]:
        images, labels = batch[:2]
        data_key, model_key = rng.split(key, 2)
        output = forward(cast(params, dtype), prepare(images, data_key), config, ops, model_key)
        logits = output.logits.to(torch.promote_types(dtype, torch.float32))
        cross_entropy, penalty = F.cross_entropy(logits, labels), ops.penalty(output.heads)
        correct = (logits.detach().argmax(-1) == labels).sum()
        return cross_entropy + penalty, Aux(cross_entropy, penalty, correct)

    return loss


def value_and_grad(fn: Callable[..., tuple[Tensor, Aux]], differentiator: str = "autograd") -> Callable[..., Any]:
    """fn(params, *args) -> (value, Aux)  becomes  (params, *args) -> (value, Aux, gradients by name)."""
    if choose("differentiator", differentiator, DIFFERENTIATORS) == "func":
        transformed = torch.func.grad_and_value(fn, has_aux=True)

        def by_func(params: Params, *args: Any) -> tuple[Tensor, Aux, Params]:
            gradients, (value, aux) = transformed(params, *args)
            return value, aux, gradients

        return by_func

    def by_autograd(params: Params, *args: Any) -> tuple[Tensor, Aux, Params]:
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        with torch.enable_grad():
            value, aux = fn(leaves, *args)
        gradients = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
        return value.detach(), Aux(*(a.detach() for a in aux)), dict(zip(leaves, gradients, strict=True))

    return by_autograd


def clipped(gradients: Params, largest: float) -> Params:
    """The gradients, scaled down to the global norm `largest` if theirs is above it (Pascanu et al., ICML 2013)."""
    norm = torch.stack(torch._foreach_norm(list(gradients.values()))).norm()
    scale = (largest / (norm + 1e-6)).clamp(max=1)
    return {name: g * scale for name, g in gradients.items()}


def adamw(state: State, gradients: Params, optimizer: AdamW) -> tuple[State, Tensor]:
    """One AdamW update, a group of parameters at a time; returns the next state and the learning rate used (0-d)."""
    if optimizer.clip is not None:
        gradients = clipped(gradients, optimizer.clip)
    rate, step = optimizer.rate(state.step), state.step + 1
    correction1, correction2 = 1 - optimizer.beta1 ** step.double(), 1 - optimizer.beta2 ** step.double()
    root, scale, kept = correction2.sqrt(), rate / correction1, 1 - rate * optimizer.weight_decay
    params: Params = {}
    mean: Params = {}
    square: Params = {}
    for names in _groups(state.params):
        p, g, m, v = ([tree[name] for name in names] for tree in (state.params, gradients, state.mean, state.square))
        first = torch._foreach_lerp(m, g, 1 - optimizer.beta1)
        second = torch._foreach_addcmul(torch._foreach_mul(v, optimizer.beta2), g, g, value=1 - optimizer.beta2)
        update = torch._foreach_sqrt(second)
        torch._foreach_div_(update, root.to(p[0].dtype))  # of another type it would be one launch a tensor
        torch._foreach_add_(update, optimizer.eps)
        torch._foreach_reciprocal_(update)
        torch._foreach_mul_(update, first)
        torch._foreach_mul_(update, scale.to(p[0].dtype))
        decayed = [old * kept if optimizer.decays(name) else old for name, old in zip(names, p, strict=True)]
        new = torch._foreach_sub(decayed, update)
        for tree, tensors in ((params, new), (mean, first), (square, second)):
            tree.update(zip(names, tensors, strict=True))
    return State(params, mean, square, step, state.key), rate


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


def make_step(
    loss: Objective,
    optimizer: AdamW,
    differentiator: str = "autograd",
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda fn: fn,
) -> Step:
    """The pure step. `wrap` (a compiler) takes the whole step under "func", and under "autograd" the loss and
    the update each: there the compiler splits the loss into a forward and a backward graph."""

    def differentiate(params: Params, batch: Batch, key: Tensor, count: Tensor) -> tuple[Tensor, Aux]:
        return loss(params, batch, rng.fold_in(key, count))

    def update(state: State, gradients: Params) -> tuple[State, Tensor]:
        return adamw(state, gradients, optimizer)

    inner = wrap if differentiator == "autograd" else lambda fn: fn
    gradient, apply = value_and_grad(inner(differentiate), differentiator), inner(update)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        images, labels, *rest = batch
        old = rest[0] if rest else {}
        value, aux, gradients = gradient(state.params | old, (images, labels), state.key, state.step)
        norms = {name: gradients.pop(name) for name in old} or None
        state, rate = apply(state, gradients)
        return state, Metrics(value, aux.cross_entropy, aux.penalty, aux.correct, rate, norms)

    return step if differentiator == "autograd" else wrap(step)
