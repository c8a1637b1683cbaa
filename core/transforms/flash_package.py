"""The flash-attn package behind two names: version 2 (CUDA C++; Ampere and newer) and version 4 (CUTLASS DSL; Hopper
and Blackwell). Dao, arXiv 2307.08691; https://github.com/Dao-AILab/flash-attention.

Its kernels stand in two operators of our own, which give shapes without device and package and are opaque to the
compiler (it cannot trace the DSL); the gradient is attached (the package's own does not work under torch.func).
"""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from core.attached import attach
from core.errors import InputError

_MODULES = {"flash-attn": "flash_attn.flash_attn_interface", "flash-attn-4": "flash_attn.cute.interface"}
_ARCHITECTURES = {"flash-attn": (8, 9, 10, 12), "flash-attn-4": (9, 10)}
_EXACT = (False, -1, -1, 0.0, None)  # not causal, no window, no soft cap, no ALiBi slopes


def attention(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention by the package's kernels: q, k, v [B,h,N,d] -> [B,h,N,d].

    name: "flash-attn" (version 2) or "flash-attn-4". When called with values (not on fake tensors), raises what
    `require` does.
    """
    _operators()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        operands = [t.transpose(1, 2) for t in (q, k, v)]
        output, lse = torch.ops.vit_ablations.flash_attn(*(t.detach() for t in operands), name)

        def gradient(G: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
            return torch.ops.vit_ablations.flash_attn_backward(G, *kept, name)

        return attach(output, operands, [*operands, output.detach(), lse], gradient).transpose(1, 2)

    return attend


def require(name: str, dtype: torch.dtype, head_width: int, device: torch.device) -> Any:
    """The package's module; InputError with what to type instead where it is not installed, or its kernels cannot
    take such an input."""
    if device.type != "cuda":
        raise InputError(f"flash@{name} needs a CUDA device; use flash@sdpa or flash@tiled")
    major, minor = torch.cuda.get_device_capability(device)
    if major not in _ARCHITECTURES[name]:
        wanted = ", ".join(f"{known}.x" for known in _ARCHITECTURES[name])
        raise InputError(
            f"flash@{name} needs compute capability {wanted}, this GPU has {major}.{minor}; use flash@sdpa or "
            "flash@tiled"
        )
    if dtype not in (torch.float16, torch.bfloat16):
        raise InputError(
            f"flash@{name} takes bfloat16 or float16, not {str(dtype)[6:]}; pass --precision bf16 or use flash@tiled"
        )
    widest = 128 if name == "flash-attn-4" else 256
    if head_width % 8 or head_width > widest:
        raise InputError(
            f"flash@{name} takes head widths that 8 divides, up to {widest}, not {head_width}; use flash@tiled"
        )
    try:
        return importlib.import_module(_MODULES[name])
    except ImportError as error:
        wanted = "flash-attn>=2.7" if name == "flash-attn" else name
        raise InputError(
            f"flash@{name} needs its package ({error}): pip install '{wanted}', or use flash@sdpa"
        ) from error


def _forward(q: Tensor, k: Tensor, v: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """[B,N,h,d] -> output [B,N,h,d] and log-sum-exp [B,h,N]."""
    module = require(name, q.dtype, q.shape[-1], q.device)
    if name == "flash-attn":
        output, lse, *_ = module._wrapped_flash_attn_forward(q, k, v, 0.0, _scale(q), *_EXACT, False)
    else:
        output, lse, *_ = module._flash_attn_fwd(q, k, v, softmax_scale=_scale(q), return_lse=True)
    return output, lse


def _backward(
    G: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v [B,N,h,d]."""
    module = require(name, q.dtype, q.shape[-1], q.device)
    if name == "flash-attn":
        dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        module._wrapped_flash_attn_backward(G, q, k, v, output, lse, dq, dk, dv, 0.0, _scale(q), *_EXACT, False, None)
    else:
        dq, dk, dv, *_ = module._flash_attn_bwd(q, k, v, output, G, lse, softmax_scale=_scale(q))
    return dq, dk, dv


def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, name: str) -> tuple[Tensor, Tensor]:
    B, N, h, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, h, N, dtype=torch.float32)


def _backward_shapes(G: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@cache
def _operators() -> None:
    """Defines torch.ops.vit_ablations.flash_attn and its backward; on first use, for it costs a second of imports."""
    for name, kernel, shapes in (
        ("flash_attn", _forward, _forward_shapes),
        ("flash_attn_backward", _backward, _backward_shapes),
    ):
        torch.library.custom_op(f"vit_ablations::{name}", kernel, mutates_args=()).register_fake(shapes)


def _scale(q: Tensor) -> float:
    return q.shape[-1] ** -0.5
