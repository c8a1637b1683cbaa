"""CRS: weight gradients from a sample of rows (winner-take-all column-row sampling).

Liu et al., NeurIPS 2023, arXiv 2305.15265. For Y = X W^T + b over n rows with G = dL/dY, dW = sum_i g_i x_i^T is
estimated from k = max(1, floor(ratio·n)) rows drawn in the forward pass; only these rows of X are kept. Y, dX and db
are exact, so no noise travels to other layers. Contract: unbiased gradient (Adam's update of it is not).
"""

from collections.abc import Callable
from dataclasses import replace
from math import floor

import torch
import torch.nn.functional as F
from torch import Tensor

from core import rng
from core.errors import InputError, choose
from core.ops import EXACT, Ops, Rewrite, Site
from core.transforms.attached import attach

SCOPES = ("maps", "published")
ESTIMATORS = ("wta", "systematic", "plain")
NORMS = ("activation", "cached")

Sampler = Callable[[Tensor, int, Tensor], tuple[Tensor, Tensor]]


def crs(
    ratio: float, scope: str = "maps", estimator: str = "wta", keep_cls: bool = True, norms: str = "activation"
) -> Rewrite:
    """Estimate the gradients of `linear` (and `product`) from a share `ratio` of the rows; 1 changes nothing.

    scope: "maps" = qkv, fc1, fc2, and proj under plain attention (fused attention keeps proj's input anyway);
        "published" = the q, k, v maps and both attention products, whose two gradients are both estimated.
    estimator: see `sample`. keep_cls: rows of the class token are always among the sampled, with weight 1: with
        class-token pooling they alone have a gradient in the last block.
    norms: rows of maps are drawn in proportion to |x_i|, or with "cached" to |x_i| times |g_i| at the image's last
        visit (Liu et al., section 3.3), which step.py gives back for the next.

    Raises InputError for a ratio outside (0, 1], an unknown scope, estimator or norms, ops whose maps, products or
    (published scope) attention are rewritten already, and, when called, "cached" without image indices.
    """
    if not 0 < ratio <= 1:
        raise InputError(f"crs ratio {ratio} is outside (0, 1]: write the share of rows to keep, such as 0.3")
    choose("crs scope", scope, SCOPES)
    choose("crs estimator", estimator, ESTIMATORS)
    choose("crs norms", norms, NORMS)

    def draw(p: Tensor, k: int, key: Tensor) -> tuple[Tensor, Tensor]:
        return sample(p, k, key, estimator)

    def linear(x: Tensor, weight: Tensor, bias: Tensor, key: Tensor | None, site: Site | None = None) -> Tensor:
        if key is None or not _covers(scope, site):
            return F.linear(x, weight, bias)
        if norms == "activation":
            return sampled_linear(x, weight, bias, ratio, key, draw, keep_cls)
        if site is None or site.norms is None:
            raise InputError(
                "crs norms 'cached' needs the gradient norms of the batch's images from their last visit: pass them, "
                "looked up by image index, as the third part of the step's batch, or use crs norms 'activation'"
            )
        if site.norms.shape != x.shape[:-1]:
            raise InputError(
                f"crs norms 'cached' remembers {site.norms.shape[-1]} tokens an image, not {x.shape[-2]}: it cannot "
                "follow tokens that mrt chooses anew; use crs norms 'activation', or leave out mrt"
            )
        return sampled_linear(x, weight, bias, ratio, key, draw, keep_cls, site.norms)

    def product(a: Tensor, b: Tensor, key: Tensor | None) -> Tensor:
        return a @ b if key is None else sampled_product(a, b, ratio, key, draw, keep_cls)

    def rewrite(ops: Ops) -> Ops:
        if ratio == 1:
            return ops
        if ops.linear is not EXACT.linear or ops.product is not EXACT.product or ops.mlp is not EXACT.mlp:
            raise InputError(
                "crs cannot be combined with another transform of the linear maps or products, such as recompute: "
                "both decide what the maps keep; choose one"
            )
        if scope == "maps":
            return replace(ops, linear=linear)
        if ops.attend is not EXACT.attend:
            raise InputError(
                "crs scope 'published' samples the attention products and cannot be combined with flash, which never "
                "forms the N x N matrix that they multiply; use crs scope 'maps', or leave out flash"
            )
        return replace(ops, linear=linear, product=product)

    return rewrite


def _covers(scope: str, site: Site | None) -> bool:
    """Whether the map at this site is sampled; one called by itself is."""
    if site is None:
        return True
    if scope == "published":
        return site.layer == "attn.qkv"
    return site.layer != "attn.proj" or site.ops.attend is EXACT.attend


def sampled_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    ratio: float,
    key: Tensor,
    draw: Sampler,
    keep_cls: bool = True,
    norms: Tensor | None = None,
) -> Tensor:
    """x [...,I] W^T + b, with dW estimated from rows of x.

    keep_cls: row 0 of every sequence of x [B,N,I] is a class token, kept with weight 1 and beyond the k rows if
    they do not suffice. norms: last |g_i| of the rows [B,N], 0 where unknown; its "gradient" is the new |g_i|.
    """
    rows = x.detach().flatten(0, -2)
    n = len(rows)
    B = len(x) if keep_cls and x.dim() == 3 else 0
    k = max(_share(ratio, n), B + 1)
    if k >= n:
        return F.linear(x, weight, bias)
    y = F.linear(x, weight.detach(), bias)
    p = _norms(rows, -1) if norms is None else _norms(rows, -1) * _relative(norms.detach()).flatten()
    if B:
        N = n // B
        drawn, scale = draw(p.unflatten(0, (B, N))[:, 1:].flatten(), k - B, key)
        classes = torch.arange(0, n, N, device=x.device)
        index = torch.cat((classes, drawn + torch.div(drawn, N - 1, rounding_mode="floor") + 1))
        scale = torch.cat((scale.new_ones(B), scale))
    else:
        index, scale = draw(p, k, key)
    sampled = (rows.index_select(0, index) * scale[:, None]).to(x.dtype)  # a rounded weight would be a bias

    def gradient(G: Tensor, sampled: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        of_weight = G.flatten(0, -2).index_select(0, index).mT @ sampled
        return (of_weight,) if norms is None else (of_weight, _norms(G, -1))

    return attach(y, [weight] if norms is None else [weight, norms], [sampled, index], gradient)


def _relative(norms: Tensor) -> Tensor:
    """Remembered norms over their mean, unknown ones (0) as the mean, all raised by a tenth of it so that every row
    can be drawn: a p of 0 where there is a gradient would be a bias."""
    known = norms > 0
    mean = norms.sum() / known.sum().clamp_min(1)
    return torch.where(known, norms / mean.clamp_min(1e-30), 1.0) + 0.1


def sampled_product(a: Tensor, b: Tensor, ratio: float, key: Tensor, draw: Sampler, keep_cls: bool = True) -> Tensor:
    """a [...,M,K] @ b [...,K,N], with da = G b^T estimated from columns of b and db = a^T G from rows of a.

    The two draws are independent, and each matrix of the batch has its own. keep_cls: row 0 of a is kept.
    """
    first, second = rng.split(key, 2)
    x, z = a.detach(), b.detach()
    y = x @ z
    columns, scale = draw(_norms(z, -2), _share(ratio, z.shape[-1]), first)
    kept_b = (torch.take_along_dim(z, columns[..., None, :], -1) * scale[..., None, :]).to(z.dtype)
    k = _share(ratio, x.shape[-2])
    if keep_cls and x.shape[-2] > 1:
        drawn, scale = draw(_norms(x, -1)[..., 1:], max(k - 1, 1), second)
        rows = torch.cat((torch.zeros_like(drawn[..., :1]), drawn + 1), -1)
        scale = torch.cat((torch.ones_like(scale[..., :1]), scale), -1)
    else:
        rows, scale = draw(_norms(x, -1), k, second)
    kept_a = (torch.take_along_dim(x, rows[..., None], -2) * scale[..., None]).to(x.dtype)

    def gradient(G: Tensor, kept_a: Tensor, kept_b: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        grad_a = torch.take_along_dim(G, columns[..., None, :], -1) @ kept_b.mT
        return grad_a, kept_a.mT @ torch.take_along_dim(G, rows[..., None], -2)

    return attach(y, [a, b], [kept_a, kept_b, rows, columns], gradient)


def _share(ratio: float, n: int) -> int:
    return max(1, floor(ratio * n + 1e-9))


def _norms(x: Tensor, axis: int) -> Tensor:
    return torch.linalg.vector_norm(x, dim=axis, dtype=torch.promote_types(x.dtype, torch.float32))


def sample(p: Tensor, k: int, key: Tensor, estimator: str = "wta") -> tuple[Tensor, Tensor]:
    """k rows of n by their sizes p [...,n] >= 0 (of any scale): index [...,k] int64 and weight [...,k].

    Unbiased: the expected total weight of every row with p > 0 is 1, to the 24 bits of a draw. The c largest are
    winners, with weight 1; the s = k - c others are drawn from the rest of sum T and weigh T / (s p_i).
    "plain": c = 0, draws with replacement. "wta": c minimises T² / s, the bound of the variance (Liu et al.,
    equation 6, prints T / s), draws with replacement. "systematic": c such that no inclusion probability s p_i / T is
    above 1, draws at equal distances (Madow 1949): no row of p > 0 twice, but for rounding.
    Sums are taken from the smallest up, in at least float32. Raises ValueError for k outside 1 to n, InputError for
    an unknown estimator.
    """
    n = p.shape[-1]
    if not 1 <= k <= n:
        raise ValueError(f"k {k} is outside 1 to {n}, the number of rows")
    choose("crs estimator", estimator, ESTIMATORS)
    value, order = p.to(torch.promote_types(p.dtype, torch.float32)).sort(dim=-1, descending=True, stable=True)
    sums = value.flip(-1).cumsum(-1)
    tail, slot = sums.flip(-1)[..., :k], torch.arange(k, device=p.device)  # tail[c]: all but the c largest
    if estimator == "plain":
        c = torch.zeros_like(order[..., :1])
    elif estimator == "wta":
        c = (tail.square() / (k - slot)).argmin(-1, keepdim=True)
    else:
        c = (value[..., :k] * (k - slot) <= tail).to(torch.int64).argmax(-1, keepdim=True)
    T, s, place = tail.gather(-1, c), k - c, slot - c
    if estimator == "systematic":
        share = (place + rng.uniform(key, (*p.shape[:-1], 1))) / s
    else:
        share = rng.uniform(key, (*p.shape[:-1], k))
    found = n - 1 - torch.searchsorted(sums, (share * T).contiguous(), right=True)
    position = torch.where(place < 0, slot, torch.maximum(found, c))
    drawn = value.gather(-1, position)
    weight = torch.where(place < 0, 1.0, torch.where(drawn > 0, T / (s * drawn), 0.0))
    return order.gather(-1, position), weight
