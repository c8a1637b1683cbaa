"""Muon (Jordan 2024, kellerjordan.github.io/posts/muon): orthogonalised momentum for the blocks' matrices, the arm's
own optimizer for the rest."""

from typing import NamedTuple

import torch

from core.ops import Rewrite, rewrite


def muon(learning_rate: float = 0.02, momentum: float = 0.95) -> Rewrite:
    """learning_rate: of the matrices, times the other optimizer's schedule and sqrt(max(1, rows / columns))."""
    return rewrite("muon", optimizer=lambda inner: Muon(inner, learning_rate, momentum))


class Muon(NamedTuple):
    inner: object
    learning_rate: float
    momentum: float

    def init(self, params):
        mine, rest = split(params)
        return {name: torch.zeros_like(p) for name, p in mine.items()}, self.inner.init(rest)

    def update(self, params, gradients, state, step):
        (mine, rest), (g, others), (buffers, inner) = split(params), split(gradients), state
        rest, inner = self.inner.update(rest, others, inner, step)
        schedule = self.inner.rate(step) / self.inner.learning_rate
        buffers = {n: self.momentum * buffers[n] + g[n] for n in mine}
        for n, p in mine.items():
            change = orthogonal(g[n] + self.momentum * buffers[n])
            rate = (self.learning_rate * schedule * max(1, p.shape[0] / p.shape[1]) ** 0.5).to(p.dtype)
            mine[n] = p - rate * change
        return {n: mine[n] if n in mine else rest[n] for n in params}, (buffers, inner)

    def rate(self, step):
        return self.inner.rate(step)


def split(tree):
    mine = {n: t for n, t in tree.items() if n.startswith("blocks.") and t.ndim == 2}
    return mine, {n: t for n, t in tree.items() if n not in mine}


def orthogonal(matrix, steps=5):
    """Nearly U V^T of the matrix U S V^T, by the quintic Newton-Schulz iteration with Jordan's coefficients."""
    x = matrix / (matrix.norm() + 1e-7)
    x = x.mT if (wide := x.shape[0] > x.shape[1]) else x
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if wide else x
