"""Exact recomputation: outputs of LayerNorm and GELU are rebuilt in the backward pass instead of kept.

Selective activation checkpointing (Chen et al. 2016, arXiv 1604.06174), by what is cheap to rebuild. Contract: exact.
A block keeps 6 u less (u = B·N·D elements), with fc1 10 u less: the control for every claim of saved memory.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from core.attached import PARTS, attach
from core.layers import activate, kept, normalize
from core.ops import Rewrite, Site, rewrite


def recompute(fc1: bool = False) -> Rewrite:
    """Rebuild, in the backward pass, the inputs of the maps qkv, fc1 and fc2 from what their LayerNorm or GELU keeps.

    fc1: rebuild the output of the MLP's first map too (one more matrix product a block), which GELU would keep.
    """
    if fc1:
        inside = ("norm2", "mlp.fc1", "mlp.fc2")
        return rewrite("recompute", replace={"linear": linear, "mlp": mlp}, at=("attn.qkv",), inside=inside)
    return rewrite("recompute", replace={"linear": linear}, at=("attn.qkv", "mlp.fc1", "mlp.fc2"))


def linear(site: Site, before: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """before(*inputs) W^T + b that keeps the inputs, and not before(*inputs)."""
    x = before(*inputs)
    weight, bias = site.affine(x.dtype)

    def gradient(G: Tensor, *inputs: Tensor) -> tuple[Tensor]:
        return (G.flatten(0, -2).mT @ before(*after(G, *inputs)).flatten(0, -2),)

    return attach(F.linear(x, weight.detach(), bias), [weight], inputs, gradient)


def mlp(site: Site, x: Tensor) -> Tensor:
    """The MLP of LayerNorm(x) [B,N,D], keeping x alone (and a dropout mask).

    It goes a part of the batch at a time: the hidden tensors of a whole batch would be the peak of the step.
    """
    own, config = site.child("mlp"), site.config
    operands = [x, *site.child("norm2").affine(), *own.child("fc1").affine(x.dtype)]
    weight, bias = own.child("fc2").affine(x.dtype)
    mask = kept(own, (*x.shape[:-1], config.mlp))

    def hidden(x: Tensor, scale: Tensor, shift: Tensor, w: Tensor, b: Tensor, *mask: Tensor) -> Tensor:
        return activate(F.linear(normalize(x, scale, shift, config.eps), w, b), config.dropout, *mask)

    def part(G: Tensor, weight: Tensor, x: Tensor, affines: Sequence[Tensor], *mask: Tensor) -> tuple[Tensor, ...]:
        h, pull, *_ = torch.func.vjp(lambda *five: hidden(*five, *mask), *after(G, x, *affines))
        rows = G.flatten(0, -2)
        of_weight = rows.mT @ h.flatten(0, -2)
        del h
        return (*pull(G @ weight), of_weight, rows.sum(0))

    def gradient(G: Tensor, weight: Tensor, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        of_x: list[Tensor] = []
        sums: list[Tensor] = []
        for g, t, *mask in zip(*(t.chunk(PARTS) for t in (G, x, *rest[4:])), strict=True):
            first, *others = part(g, weight, t, rest[:4], *mask)
            of_x.append(first)
            sums = [a + b for a, b in zip(sums, others, strict=True)] if sums else others
        return torch.cat(of_x), *sums

    values = [t.detach() for t in (*operands, weight, bias)]
    pieces = zip(*(t.chunk(PARTS) for t in (values[0], *mask)), strict=True)
    y = torch.cat([F.linear(hidden(t, *values[1:5], *mask), *values[5:]) for t, *mask in pieces])
    return attach(y, [*operands, weight, bias], [weight, *operands, *mask], gradient)


def after(G: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The inputs, for a compiler made to depend on G: it would else merge what is rebuilt from them with what the
    forward pass computed, and keep that."""
    if not torch.compiler.is_compiling():
        return inputs
    return inputs[0] + G.flatten()[0] * 0, *inputs[1:]
