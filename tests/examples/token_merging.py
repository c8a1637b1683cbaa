"""Token merging (Bolya et al., ICLR 2023, arXiv 2210.09461): r pairs of similar tokens become one in every block,
between attention and MLP; attention counts a token as many times as it has members."""

import torch
import torch.nn.functional as F

from core.ops import Rewrite, rewrite

EXTRA = 8  # columns added to the heads: fused kernels want widths that 8 divides


def token_merging(r: int = 2) -> Rewrite:
    """r: tokens fewer in every block; at most half of what is left, the class token stays."""

    def attend(inner, site, q, k, v):
        if "sizes" not in site.carry:
            return inner(site, q, k, v)
        d, wide = q.shape[-1], q.shape[-1] + EXTRA  # one more feature adds log size to every score, whatever the kernel
        log_size = site.carry["sizes"].log().to(k.dtype)[:, None] * wide**0.5
        q = torch.cat((q * (wide / d) ** 0.5, F.pad(torch.ones_like(q[..., :1]), (0, EXTRA - 1))), -1)
        k = torch.cat((k, F.pad(log_size.expand(*k.shape[:-1], 1), (0, EXTRA - 1))), -1)
        return inner(site, q, k, F.pad(v, (0, EXTRA)))[..., :d]

    def observe(inner, site, q, k, v, heads):
        return {**inner(site, q, k, v, heads), "keys": k.mean(1)}

    def block(site, x):
        branch, carry = site.ops.attention(site, x)
        keys = carry.pop("keys")
        x, sizes = merge(x + branch, keys, carry.get("sizes", torch.ones_like(x[..., :1])), r)
        return x + site.ops.mlp(site, x), {**carry, "sizes": sizes}

    if r == 0:
        return lambda ops: ops
    # Attention is to see the keys as others have made them, and the sizes beside them.
    return rewrite(
        "token_merging", replace={"block": block}, wrap={"attend": attend, "observe": observe}, innermost=True
    )


def merge(x, keys, sizes, r):
    """Tokens [B,N,D] of these sizes [B,N,1] -> [B,N-r,D] and theirs: every other token looks for the most similar of
    the others by its key [B,N,d], and the r best pairs become their mean, weighted by size."""
    keys = F.normalize(keys, dim=-1)
    scores = keys[:, ::2] @ keys[:, 1::2].mT
    first = torch.arange(scores.shape[1], device=x.device)[None, :, None] == 0
    best, partner = scores.masked_fill(first, -torch.inf).max(-1)  # the class token is never merged away
    order = best.argsort(dim=-1, descending=True, stable=True)
    r = min(r, scores.shape[1] - 1)
    gone, left = order[:, :r, None], order[:, r:].sort(-1).values[..., None]  # in order: the class token first
    to = partner[..., None].gather(1, gone)

    def merged(t):
        even, odd = t[:, ::2], t[:, 1::2]
        width = (-1, -1, t.shape[-1])
        odd = odd.scatter_add(1, to.expand(width), even.gather(1, gone.expand(width)))
        return torch.cat((even.gather(1, left.expand(width)), odd), 1)

    total = merged(sizes)
    return merged(x * sizes) / total, total
