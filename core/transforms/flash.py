"""FlashAttention: exact attention that never writes the N x N matrix.

Dao et al., NeurIPS 2022, arXiv 2205.14135 (algorithms 1 and 2); FlashAttention-2, arXiv 2307.08691.
Contract: exact. Kept for the backward pass: q, k, v, the output, and one log-sum-exp a query.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from core.attached import attach
from core.errors import InputError, choose
from core.ops import Rewrite, Site, rewrite
from core.transforms import flash_package

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def flash(backend: str = "sdpa") -> Rewrite:
    """Replace `attend` by fused attention.

    backend: "sdpa" (torch's flash kernels, CPU or CUDA), "tiled" (the algorithm in plain tensor operations),
        "flash-attn" or "flash-attn-4" (the flash-attn package, see flash_package.py).
    Raises InputError for an unknown backend, one whose package is missing, and, when called, for an input that the
    kernel cannot take: it never falls back to another.
    """
    attention = BACKENDS[choose("flash backend", backend, BACKENDS)]()

    def attend(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v)

    return rewrite("flash", replace={"attend": attend})


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's flash kernel, asked for by name: q, k, v [B,h,N,d] -> [B,h,N,d].

    Raises InputError where that kernel cannot run (on CUDA: float32, compute capability below 8.0, d > 256).
    """
    eager = (
        q.is_cuda and not torch.compiler.is_compiling()
    )  # a compiler cannot ask the device, and the kernel refuses too
    if eager and (reason := cuda_flash_obstacle(q.dtype, q.shape[-1], q.device)):
        raise InputError(reason)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


def cuda_flash_obstacle(dtype: torch.dtype, head_width: int, device: torch.device) -> str | None:
    """Why torch's CUDA flash kernel cannot take such an input and what to type instead; None if it can."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash on CUDA takes bfloat16 or float16, not {str(dtype)[6:]}; pass --precision bf16 or flash@tiled"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return (
            f"flash on CUDA needs compute capability 8.0 (Ampere) or newer, this GPU has {capability[0]}."
            f"{capability[1]}; use flash@tiled"
        )
    if head_width > 256:
        return f"flash on CUDA takes head widths up to 256, not {head_width}; use more heads or flash@tiled"
    return None


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, block: int = 64) -> Tensor:
    """The algorithm itself: q [...,N,d], k [...,M,d], v [...,M,e] -> [...,N,e], in tiles of `block` rows.

    Sums and the running maximum are kept in at least float32. Any block size of at least 1 (ValueError).
    """
    if block < 1:
        raise ValueError(f"block {block} is too small: at least 1")
    tiles = [_forward_rows(tile, k.detach(), v.detach(), block) for tile in q.detach().split(block, dim=-2)]
    output, lse = torch.cat([o for o, _ in tiles], dim=-2), torch.cat([lse for _, lse in tiles], dim=-1)

    def gradient(G: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        return _backward_tiles(q, k, v, output, lse, G, block)

    return attach(output, [q, k, v], [q, k, v, output.detach(), lse], gradient)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _forward_rows(q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """One tile of queries past all tiles of keys: its output and log-sum-exp (FlashAttention-2, algorithm 1)."""
    scaled = _wide(q) * q.shape[-1] ** -0.5
    maximum = scaled.new_full((*q.shape[:-1], 1), -torch.inf)
    total = torch.zeros_like(maximum)
    partial = scaled.new_zeros((*q.shape[:-1], v.shape[-1]))
    for k_tile, v_tile in zip(k.split(block, dim=-2), v.split(block, dim=-2), strict=True):
        scores = scaled @ _wide(k_tile).mT
        new_maximum = torch.maximum(maximum, scores.amax(-1, keepdim=True))
        weights, rescale = (scores - new_maximum).exp(), (maximum - new_maximum).exp()
        total = total * rescale + weights.sum(-1, keepdim=True)
        partial = partial * rescale + weights @ _wide(v_tile)
        maximum = new_maximum
    return (partial / total).to(v.dtype), (maximum + total.log()).squeeze(-1)


def _backward_tiles(
    q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, grad_output: Tensor, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Each tile of weights is rebuilt from the log-sum-exp (FlashAttention-2, algorithm 2)."""
    scale = q.shape[-1] ** -0.5
    delta = (_wide(grad_output) * _wide(output)).sum(-1, keepdim=True)
    rows = [t.split(block, dim=-2) for t in (q, grad_output, delta, lse[..., None])]
    grad_q = [torch.zeros_like(_wide(tile)) for tile in rows[0]]
    grad_k, grad_v = [], []
    for k_tile, v_tile in zip(k.split(block, dim=-2), v.split(block, dim=-2), strict=True):
        k_wide, v_wide = _wide(k_tile), _wide(v_tile)
        dk, dv = torch.zeros_like(k_wide), torch.zeros_like(v_wide)
        for i, (q_tile, do_tile, delta_tile, lse_tile) in enumerate(zip(*rows, strict=True)):
            q_wide, do_wide = _wide(q_tile), _wide(do_tile)
            weights = (q_wide @ k_wide.mT * scale - lse_tile).exp()
            grad_scores = weights * (do_wide @ v_wide.mT - delta_tile) * scale
            grad_q[i] = grad_q[i] + grad_scores @ k_wide
            dk = dk + grad_scores.mT @ q_wide
            dv = dv + weights.mT @ do_wide
        grad_k.append(dk)
        grad_v.append(dv)
    grads = (torch.cat(grad_q, dim=-2), torch.cat(grad_k, dim=-2), torch.cat(grad_v, dim=-2))
    return grads[0].to(q.dtype), grads[1].to(k.dtype), grads[2].to(v.dtype)


BACKENDS: dict[str, Callable[[], Attention]] = {
    "sdpa": lambda: sdpa_attention,
    "tiled": lambda: tiled_attention,
    "flash-attn": lambda: flash_package.attention("flash-attn"),
    "flash-attn-4": lambda: flash_package.attention("flash-attn-4"),
}
