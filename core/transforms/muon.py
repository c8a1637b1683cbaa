"""Muon: the blocks' matrices take steps along their orthogonalised momentum, the rest AdamW's (Jordan et al. 2024,
kellerjordan.github.io/posts/muon).

Contract: changes the update. Matrices decay as torch.optim.Muon's do, by rate times weight decay, for without decay
their steps, of equal size whatever the gradient's, would soon be small beside them (Kosson et al., ICML 2024, arXiv
2305.17212). Control: the baseline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from core.errors import InputError
from core.ops import Params, Rewrite, rewrite

if TYPE_CHECKING:
    from core.optimizers import Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's: steepest at 0, not convergent


def muon(learning_rate: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.01) -> Rewrite:
    """learning_rate: of the matrices, times the schedule of the recipe's optimizer and sqrt(max(1, rows / columns)).

    Raises InputError for a learning rate or decay that is negative or not finite, a momentum outside [0, 1).
    """
    for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if not 0 <= value < float("inf"):
            raise InputError(f"muon {name} {value} must be finite and 0 or above")
    if not 0 <= momentum < 1:
        raise InputError(f"muon momentum {momentum} is outside [0, 1): write for example 0.95")
    return rewrite("muon", optimizer=lambda rest: Muon(rest, learning_rate, momentum, weight_decay))


class Muon(NamedTuple):
    """The optimizer; `rest`: the one for what is no matrix of a block. State: the momentum by name, and the other's."""

    rest: Optimizer
    learning_rate: float
    momentum: float
    weight_decay: float

    def init(self, params: Params) -> tuple[Params, Any]:
        """Zeros, and the other's. InputError for a map qkv that is not three square ones."""
        matrices, others = separated(params)
        for name, p in matrices.items():
            if name.endswith("attn.qkv.weight") and len(p) != 3 * p.shape[1]:
                raise InputError(
                    f"muon takes {name} for three square matrices, and it is one of {len(p)} x {p.shape[1]}; leave "
                    "muon out"
                )
        return {name: torch.zeros_like(p) for name, p in matrices.items()}, self.rest.init(others)

    def update(self, params: Params, gradients: Params, state: Any, step: Tensor) -> tuple[Params, Any]:
        """One update, with Nesterov's momentum."""
        (matrices, others), (g, of_others), (old, inner) = separated(params), separated(gradients), state
        others, inner = self.rest.update(others, of_others, inner, step)
        means = {name: torch.lerp(old[name], g[name], 1 - self.momentum) for name in matrices}
        rate = self.learning_rate * self.rate(step) / self.rest.learning_rate
        for name, p in matrices.items():
            ahead = torch.lerp(g[name], means[name], self.momentum)
            parts = ahead.unflatten(0, (3, -1)) if name.endswith("attn.qkv.weight") else ahead
            scale = max(1, parts.shape[-2] / parts.shape[-1]) ** 0.5
            change = orthogonal(parts).reshape(p.shape)
            matrices[name] = p * (1 - rate * self.weight_decay).to(p.dtype) - (rate * scale).to(p.dtype) * change
        return {name: matrices[name] if name in matrices else others[name] for name in params}, (means, inner)

    def rate(self, step: Tensor) -> Tensor:
        """The other's."""
        return self.rest.rate(step)


def separated(tree: Params) -> tuple[Params, Params]:
    """The blocks' matrices, and the rest."""
    matrices = {name: t for name, t in tree.items() if name.startswith("blocks.") and t.ndim == 2}
    return matrices, {name: t for name, t in tree.items() if name not in matrices}


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearly U V^T of matrices [...,n,m] = U S V^T, by the quintic Newton-Schulz iteration, in their own precision."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
