"""Readout for a module: what its last block computes behind the keys and values is computed for the class token, and
expanded to where the module looks for all tokens. Nobody reads the others; their gradients are zero.

What it keeps is as little as of our own model; the queries of all tokens, and sums with x, are computed still.
"""

from collections.abc import Callable

from torch import Tensor

from core.ops import Rewrite, Site, rewrite


def _behind(site: Site) -> bool:
    return site.block == site.config.depth - 1 and site.name not in ("norm1", "attn.qkv")


def linear(inner: Callable[..., Tensor], site: Site, before: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Of x [B,N,D] the first row."""
    if not _behind(site):
        return inner(site, before, *inputs)
    x, *rest = inputs
    return inner(site, before, x[:, :1].clone(), *rest).expand(*x.shape[:-1], -1)


def norm(inner: Callable[..., Tensor], site: Site, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Likewise of norm2, and of the one behind all blocks."""
    if x.dim() == 3 and (site.name == "norm" or (site.name == "norm2" and _behind(site))):
        return inner(site, x[:, :1].clone(), weight, bias).expand(x.shape)  # of a view, it would keep all of x
    return inner(site, x, weight, bias)


def attend(inner: Callable[..., Tensor], site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of the first query, unless another transform looks at the heads."""
    if not _behind(site) or site.ops.observed:
        return inner(site, q, k, v)
    return inner(site, q[:, :, :1], k, v).expand(*q.shape[:-1], -1)


readout: Rewrite = rewrite("readout", wrap={"linear": linear, "norm": norm, "attend": attend})
