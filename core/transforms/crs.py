"""CRS: weight gradients from a sample of rows (winner-take-all column-row sampling).

Liu et al., NeurIPS 2023, arXiv 2305.15265. For Y = X W^T + b over n rows with G = dL/dY, dW = sum_i g_i x_i^T is
estimated from k = max(1, floor(ratio·n)) rows drawn in the forward pass; only these rows of X are kept. Y, dX and db
are exact, so no noise travels to other layers. Contract: unbiased gradient (Adam's update of it is not).
"""

from collections.abc import Callable
from math import floor

import torch
import torch.nn.functional as F
from torch import Tensor

from core import layers, rng
from core.attached import attach
from core.errors import InputError, choose
from core.ops import Rewrite, Site, rewrite

SCOPES = ("maps", "published")
ESTIMATORS = ("wta", "systematic", "plain")

Sampler = Callable[[Tensor, int, Tensor], tuple[Tensor, Tensor]]


def crs(ratio: float, scope: str = "maps", estimator: str = "wta", keep_cls: bool = True) -> Rewrite:
    """Estimate the weight gradients of a block's linear maps from a share `ratio` of the rows; 1 changes nothing.

    Called without a key (as in evaluation, or `forward(params, images, config, crs(0.3)(EXACT))`) nothing is drawn and
    every gradient is exact: a test of the estimate needs a key.
    scope: "maps" = qkv, fc1, fc2, and proj under plain attention (fused attention keeps proj's input anyway);
        "published" = the q, k, v maps and both attention products, whose two gradients are both estimated.
    estimator: see `sample`. keep_cls: rows of the class token are always among the sampled, with weight 1: with
        class-token pooling they alone have a gradient in the last block.

    Raises InputError for a ratio outside (0, 1], an unknown scope or estimator.
    """
    if not 0 < ratio <= 1:
        raise InputError(f"crs ratio {ratio} is outside (0, 1]: write the share of rows to keep, such as 0.3")
    choose("crs scope", scope, SCOPES)
    choose("crs estimator", estimator, ESTIMATORS)

    def draw(p: Tensor, k: int, key: Tensor) -> tuple[Tensor, Tensor]:
        return sample(p, k, key, estimator)

    def linear(site: Site, before: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        key = site.key("crs")
        if key is None or (site.name == "attn.proj" and site.ops.replaces("attend")):
            return layers.linear(site, before, *inputs)
        x = before(*inputs)
        return sampled_linear(x, *site.affine(x.dtype), ratio, key, draw, keep_cls)

    def attend(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        key = site.key("crs")
        if key is None:
            return layers.attend(site, q, k, v)
        first, second = rng.split(key, 2)
        scores = sampled_product(q * q.shape[-1] ** -0.5, k.mT, ratio, first, draw, keep_cls)
        weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype)
        return sampled_product(weights, v, ratio, second, draw, keep_cls)

    if ratio == 1:
        return lambda ops: ops
    if scope == "published":
        return rewrite("crs", replace={"linear": linear, "attend": attend}, at=("attn.qkv",))
    return rewrite("crs", replace={"linear": linear}, at=layers.MAPS)


def sampled_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    ratio: float,
    key: Tensor,
    draw: Sampler,
    keep_cls: bool = True,
) -> Tensor:
    """x [...,I] W^T + b, with dW estimated from rows of x, drawn in proportion to |x_i|.

    keep_cls: row 0 of every sequence of x [B,N,I] is a class token, kept with weight 1 and beyond the k rows if
    they do not suffice.
    """
    rows = x.detach().flatten(0, -2)
    n = len(rows)
    B = len(x) if keep_cls and x.dim() == 3 else 0
    k = max(_count(ratio, n), B + 1)
    if k >= n:
        return F.linear(x, weight, bias)
    y = F.linear(x, weight.detach(), bias)
    p = _norms(rows, -1)
    if B:
        N = n // B
        drawn, scale = draw(p.unflatten(0, (B, N))[:, 1:].flatten(), k - B, key)
        classes = torch.arange(0, n, N, device=x.device)
        index = torch.cat((classes, drawn + torch.div(drawn, N - 1, rounding_mode="floor") + 1))
        scale = torch.cat((scale.new_ones(B), scale))
    else:
        index, scale = draw(p, k, key)
    sampled = (rows.index_select(0, index) * scale[:, None]).to(x.dtype)  # a rounded weight would be a bias

    def gradient(G: Tensor, sampled: Tensor, index: Tensor) -> tuple[Tensor]:
        return (G.flatten(0, -2).index_select(0, index).mT @ sampled,)

    return attach(y, [weight], [sampled, index], gradient)


def sampled_product(a: Tensor, b: Tensor, ratio: float, key: Tensor, draw: Sampler, keep_cls: bool = True) -> Tensor:
    """a [...,M,K] @ b [...,K,N], with da = G b^T estimated from columns of b and db = a^T G from rows of a.

    The two draws are independent, and each matrix of the batch has its own. keep_cls: row 0 of a is kept.
    """
    first, second = rng.split(key, 2)
    x, z = a.detach(), b.detach()
    y = x @ z
    columns, scale = draw(_norms(z, -2), _count(ratio, z.shape[-1]), first)
    kept_b = (torch.take_along_dim(z, columns[..., None, :], -1) * scale[..., None, :]).to(z.dtype)
    k = _count(ratio, x.shape[-2])
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


def _count(ratio: float, n: int) -> int:
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
