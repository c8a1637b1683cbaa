"""DeCAtt: a penalty on the correlation of attention heads (Bhattacharyya et al., CVPRW 2023).

Contract: changes the objective. A is the heads' output (weights times values, before the projection),
flattened to [B, h, N·d]; C1_b = A_b A_b^T / |A_b|^2, C2 = mean over b of C1_b squared elementwise,
L = sum of C2 off the diagonal. The N x N matrices are not needed, so it works with fused attention.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from core.errors import InputError, choose
from core.ops import Rewrite, Site, rewrite

NORMS = ("per_head", "frobenius")


def decatt(weight: float = 1.0, norm: str = "per_head", layers: str | Sequence[int] = "all") -> Rewrite:
    """Add weight · (mean of `decorrelation` over the layers) to the objective.

    layers: "all", or block indices (negative from the end). Raises InputError for a weight below 0 or not
    finite, an unknown norm, no layers, and, when called, an index that the model does not have.
    """
    if not 0 <= weight < float("inf"):
        raise InputError(f"decatt weight {weight} must be finite and 0 or above")
    choose("decatt norm", norm, NORMS)
    indices = isinstance(layers, tuple | list) and bool(layers) and all(type(i) is int for i in layers)
    if layers != "all" and not indices:
        raise InputError(f"decatt layers {layers!r}; legal: 'all' or block indices such as (0, -1)")

    def penalty(inner: Callable[..., Tensor], site: Site, heads: Tensor) -> Tensor:
        depth = site.config.depth
        chosen = list(range(depth)) if isinstance(layers, str) else [_existing(i, depth) for i in layers]
        times = 1 if isinstance(layers, str) else sum(i == site.block for i in chosen)
        before = inner(site, heads)
        return before + weight * times / len(chosen) * decorrelation(heads, norm) if times else before

    if weight == 0:
        return lambda ops: ops
    return rewrite("decatt", wrap={"penalty": penalty}, positional=() if isinstance(layers, str) else layers)


def _existing(index: int, depth: int) -> int:
    if not -depth <= index < depth:
        raise InputError(f"decatt layer {index} does not exist; legal: {-depth} to {depth - 1}")
    return index % depth


def decorrelation(heads: Tensor, norm: str = "per_head", eps: float = 1e-12) -> Tensor:
    """L of head outputs [B,h,N,d], a scalar in at least float32.

    norm: "per_head" divides by the heads' own lengths (cosines: 0 <= L <= h(h-1)); "frobenius" by |A_b|^2, the
        definition read literally (heads of equal length: cosine / h, so 0 <= L <= (h-1)/h).
    eps: lengths below it count as eps, as in torch.nn.functional.normalize.
    """
    choose("decatt norm", norm, NORMS)
    A = heads.flatten(2).to(torch.promote_types(heads.dtype, torch.float32))
    gram = A @ A.mT
    diagonal = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    squares = (gram * diagonal).sum(-1)  # gram.diagonal() gets a wrong gradient from torch.compile (2.11 to 2.14)
    if norm == "frobenius":
        squares = squares.sum(-1, keepdim=True)
    inverse = squares.clamp_min(eps**2).rsqrt()
    correlation = gram * inverse[..., :, None] * inverse[..., None, :]
    return (correlation.square().mean(0) * (1 - diagonal)).sum()
