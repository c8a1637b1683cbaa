"""Gradients of one's own choosing for an operation whose value stays as it is."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PARTS = 8  # of a batch, one at a time, so that float copies of large tensors are not the peak of a step
Gradient = Callable[..., tuple[Tensor, ...]]  # (G, *kept) -> one gradient an operand


def attach(y: Tensor, operands: Sequence[Tensor], kept: Sequence[Tensor], gradient: Gradient) -> Tensor:
    """y, with the gradients of the operands added: gradient(dL/dy, *kept), first derivatives only.

    y must not depend on the operands for autograd (compute it from them detached); through whatever else it
    depends on, gradients flow as they did. Only `kept` is kept for the backward pass. Works under torch.func, plain
    autograd and torch.compile.
    """
    if not any(operand.requires_grad for operand in operands):
        return y  # frozen
    inputs = [*operands, *(t for t in kept if all(t is not o for o in operands))]  # dynamo wants each tensor once
    places = [next(i for i, t in enumerate(inputs) if t is k) for k in kept]
    return _Attach.apply(y, gradient, places, len(operands), *inputs)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor, gradient: Gradient, places: list[int], count: int, *inputs: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.gradient, places, count, *tensors = inputs
        ctx.rest = (None,) * (len(tensors) - count)
        ctx.save_for_backward(*(tensors[i] for i in places))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Any, ...]:
        return (G, None, None, None, *ctx.gradient(G, *ctx.saved_tensors), *ctx.rest)
