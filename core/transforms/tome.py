"""Token merging: in every block, between attention and MLP, r pairs of similar tokens become one (bipartite soft
matching; Bolya et al., ICLR 2023, arXiv 2210.09461).

Contract: changes the objective. Attention counts a token as many times as it has members ("proportional attention", the
paper's equation 1). Control: the baseline.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import InputError
from core.ops import Carry, Rewrite, Site, rewrite

_EXTRA = 8  # columns added to the heads: fused kernels want widths that 8 divides


def tome(r: int = 2) -> Rewrite:
    """r: tokens fewer in every block, in training and evaluation; the class token stays.

    Raises InputError for an r below 0 and, when called, for one with which a block would merge more than half of its
    tokens.
    """
    if r < 0:
        raise InputError(f"tome r {r} is too small: at least 0")

    def block(site: Site, x: Tensor) -> tuple[Tensor, Carry]:
        branch, carry = site.ops.attention(site, x)
        x, keys = x + branch, carry.pop("tome.keys")
        if x.shape[1] == keys.shape[1]:  # else the other tokens are of no use any more
            first = "tome.sizes" not in site.carry
            if first and r > (most := (x.shape[1] - 1) // (site.config.depth + 1)):
                raise InputError(f"tome cannot merge {r} of {x.shape[1]} tokens in every block; legal: 0 to {most}")
            sizes = torch.ones_like(x[..., :1]) if first else carry["tome.sizes"]
            x, carry["tome.sizes"] = merged(x, keys, sizes, r)
        return x + site.ops.mlp(site, x), carry

    if r == 0:
        return lambda ops: ops
    # Attention is to see the keys as others have made them, and the sizes beside them.
    return rewrite(
        "tome",
        replace={"block": block},
        wrap={"attend": attend, "observe": observe},
        innermost=True,
        positional=True,  # every block has fewer tokens
    )


def attend(inner: Callable[..., Tensor], site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with the logarithm of the keys' sizes added to the scores: a feature more, whatever the kernel."""
    if "tome.sizes" not in site.carry:
        return inner(site, q, k, v)
    d, wide = q.shape[-1], q.shape[-1] + _EXTRA
    log_size = site.carry["tome.sizes"].log().to(k.dtype)[:, None] * wide**0.5
    q = torch.cat((q * (wide / d) ** 0.5, F.pad(torch.ones_like(q[..., :1]), (0, _EXTRA - 1))), -1)
    k = torch.cat((k, F.pad(log_size.expand(*k.shape[:-1], 1), (0, _EXTRA - 1))), -1)
    return inner(site, q, k, F.pad(v, (0, _EXTRA)))[..., :d]


def observe(inner: Callable[..., Carry], site: Site, q: Tensor, k: Tensor, v: Tensor, heads: Tensor) -> Carry:
    """What tokens are matched by: their keys' mean over the heads."""
    return {**inner(site, q, k, v, heads), "tome.keys": k.detach().mean(1)}


def merged(x: Tensor, keys: Tensor, sizes: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Tokens [B,N,D] of these sizes [B,N,1] -> [B,N-r,D] and theirs: every other token looks for the most similar of
    the others by its key [B,N,d], and the r best pairs become their mean, weighted by size."""
    keys = F.normalize(keys, dim=-1)
    scores = keys[:, ::2] @ keys[:, 1::2].mT
    class_token = torch.arange(scores.shape[1], device=x.device)[None, :, None] == 0  # never merged away
    best, partner = scores.masked_fill(class_token, -torch.inf).max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    gone, left = order[:, :r, None], order[:, r:].sort(-1).values[..., None]  # in order: the class token first
    to = partner[..., None].gather(1, gone)

    def of(t: Tensor) -> Tensor:
        even, odd, width = t[:, ::2], t[:, 1::2], (-1, -1, t.shape[-1])
        odd = odd.scatter_add(1, to.expand(width), even.gather(1, gone.expand(width)))
        return torch.cat((even.gather(1, left.expand(width)), odd), 1)

    total = of(sizes)
    return of(x * sizes) / total, total
