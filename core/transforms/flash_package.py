"""The flash-attn package behind two names: version 2 (CUDA C++; Ampere and newer) and version 4 (CUTLASS DSL; Hopper
and Blackwell). Dao, arXiv 2307.08691; https://github.com/Dao-AILab/flash-attention.

The package's own autograd does not work under torch.func, so its forward and backward kernels stand in one
autograd.Function here.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from core.errors import InputError


class Kernels(NamedTuple):
    """forward: (q, k, v) -> (output, log-sum-exp [B,h,N]); backward: (d output, q, k, v, output, log-sum-exp) ->
    (dq, dk, dv). All but the log-sum-exp are [B,N,h,d]."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def attention(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention by the package's kernels: q, k, v [B,h,N,d] -> [B,h,N,d].

    name: "flash-attn" (version 2) or "flash-attn-4". Raises InputError if the package is not installed and, when
    called, for an input that its kernels cannot take.
    """
    kernels = _KERNELS[name]()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if reason := obstacle(name, q.dtype, q.shape[-1], q.device):
            raise InputError(reason)
        output, _ = _Attention.apply(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), kernels)
        return output.transpose(1, 2)

    return attend


@torch.compiler.assume_constant_result
def obstacle(name: str, dtype: torch.dtype, head_width: int, device: torch.device) -> str | None:
    """Why the kernels cannot take such an input and what to type instead; None if they can."""
    if device.type != "cuda":
        return f"flash@{name} needs a CUDA device; use flash@sdpa or flash@tiled"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in _ARCHITECTURES[name]:
        wanted = ", ".join(f"{known}.x" for known in _ARCHITECTURES[name])
        return (
            f"flash@{name} needs compute capability {wanted}, this GPU has {major}.{minor}; use flash@sdpa or "
            "flash@tiled"
        )
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash@{name} takes bfloat16 or float16, not {str(dtype)[6:]}; pass --precision bf16 or use flash@tiled"
    widest = 128 if name == "flash-attn-4" else 256
    if head_width % 8 or head_width > widest:
        return f"flash@{name} takes head widths that 8 divides, up to {widest}, not {head_width}; use flash@tiled"
    return None


_ARCHITECTURES = {"flash-attn": (8, 9, 10, 12), "flash-attn-4": (9, 10)}


def _version2() -> Kernels:
    interface = _module("flash_attn.flash_attn_interface", "flash-attn", "flash-attn>=2.7")
    exact = (0.0, False, -1, -1, 0.0, None)  # no dropout, not causal, no window, no soft cap, no ALiBi slopes

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        dropout, *others = exact
        output, lse, *_ = interface._wrapped_flash_attn_forward(q, k, v, dropout, _scale(q), *others, False)
        return output, lse

    def backward(G: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor) -> Any:
        dropout, *others = exact
        grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        interface._wrapped_flash_attn_backward(
            G, q, k, v, output, lse, *grads, dropout, _scale(q), *others, False, None
        )
        return grads

    return Kernels(forward, backward)


def _version4() -> Kernels:
    _module("flash_attn.cute.interface", "flash-attn-4", "flash-attn-4")
    return Kernels(torch.ops.vit_ablations.flash4_forward, torch.ops.vit_ablations.flash4_backward)


@torch.library.custom_op("vit_ablations::flash4_forward", mutates_args=())
def _flash4_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Opaque to the compiler, which cannot trace the DSL."""
    interface = importlib.import_module("flash_attn.cute.interface")
    output, lse, *_ = interface._flash_attn_fwd(q, k, v, softmax_scale=_scale(q), return_lse=True)
    return output, lse


@_flash4_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, N, h, _ = q.shape
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(B, h, N, dtype=torch.float32)


@torch.library.custom_op("vit_ablations::flash4_backward", mutates_args=())
def _flash4_backward(
    G: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    interface = importlib.import_module("flash_attn.cute.interface")
    dq, dk, dv, *_ = interface._flash_attn_bwd(q, k, v, output, G, lse, softmax_scale=_scale(q))
    return dq, dk, dv


@_flash4_backward.register_fake
def _(G: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    return dq, dk, dv


_KERNELS = {"flash-attn": _version2, "flash-attn-4": _version4}


def _module(path: str, name: str, package: str) -> Any:
    try:
        return importlib.import_module(path)
    except ImportError as error:
        raise InputError(
            f"flash@{name} needs its package ({error}): pip install '{package}', or use flash@sdpa"
        ) from error


def _scale(q: Tensor) -> float:
    return q.shape[-1] ** -0.5


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, kernels: Kernels) -> tuple[Tensor, Tensor]:
        return kernels.forward(q, k, v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.kernels = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.kernels.backward(G, *ctx.saved_tensors), None)
