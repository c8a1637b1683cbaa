"""Approximate and memory-sharing backward passes of GELU and LayerNorm.

Yang et al., ICML 2024, arXiv 2406.16282. Contract: biased gradient (GELU); LayerNorm's part is exact. Values are exact.
GELU(x) keeps 2 bits an element instead of x: its derivative is taken to be one of SLOPES, by the BOUNDS that x lies
between. These minimise the paper's criterion, the integral of (GELU - h)², h being piecewise linear with these slopes:
0.009507. (By symmetry the middle bound is 0 and the inner slopes add up to 1; the paper's own search, by simulated
annealing, ended at slopes -0.0492 and 1.0487 and bounds -3.186, -0.001 and 3.191.)
LayerNorm and the linear map after it keep one tensor, the normalised input, which stands for the input of both.
A block keeps 5.75 u less in float32 (u = B·N·D elements).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from core.attached import attach
from core.layers import drop
from core.layers import linear as exact_linear
from core.ops import Rewrite, Site, rewrite

_A, _C = 0.0496, 3.171
BOUNDS = (-_C, 0.0, _C)
SLOPES = (0.0, -_A, 1 + _A, 1.0)


def lowbp(norms: bool = True) -> Rewrite:
    """GELU's derivative from 2 bits. norms: LayerNorm shares what it keeps with the next linear map, too."""
    if norms:
        at = ("attn.qkv", "mlp.fc1", "mlp.fc2")
        return rewrite("lowbp", replace={"linear": linear}, at=at, inside=("norm1", "norm2"))
    return rewrite("lowbp", replace={"linear": after_gelu}, at=("mlp.fc2",))


def linear(site: Site, before: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The map of GELU(y) or of LayerNorm(x)."""
    return after_gelu(site, before, *inputs) if site.name == "mlp.fc2" else after_norm(site, *inputs)


def after_gelu(site: Site, before: Callable[..., Tensor], y: Tensor, *mask: Tensor) -> Tensor:
    """before(y, *mask) W^T + b, before being GELU and dropout by a mask, that keeps 2 bits an element of y."""

    def gradient(G: Tensor, codes: Tensor, *mask: Tensor) -> tuple[Tensor]:
        slopes = torch.tensor(SLOPES, dtype=G.dtype, device=G.device)
        return (
            drop(G, site.config.dropout, *mask) * slopes.index_select(0, unpack(codes, G.numel()).int()).view_as(G),
        )

    value = y.detach()
    x = attach(before(value, *mask), [y], [pack(value), *mask], gradient)
    return exact_linear(site, lambda x: x, x)


def pack(y: Tensor) -> Tensor:
    """How many BOUNDS each of n elements is above, four in a byte: uint8 [ceil(n / 4)]."""
    codes = sum(((y > bound).to(torch.uint8) for bound in BOUNDS), torch.zeros_like(y, dtype=torch.uint8)).flatten()
    a, b, c, d = F.pad(codes, (0, -len(codes) % 4)).view(4, -1)
    return a | b << 2 | c << 4 | d << 6


def unpack(codes: Tensor, n: int) -> Tensor:
    """What `pack` packed, uint8 [n]."""
    return torch.cat([codes >> shift & 3 for shift in (0, 2, 4, 6)])[:n]


def after_norm(site: Site, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm(x) W^T + b that keeps x normalised, and of each row the deviation."""
    weight, bias = site.affine(x.dtype)
    wide = x.detach().to(scale.dtype)
    normed, _, inverse = torch.native_layer_norm(wide, scale.shape, None, None, site.config.eps)

    def gradient(
        G: Tensor, normed: Tensor, inverse: Tensor, scale: Tensor, shift: Tensor, weight: Tensor
    ) -> tuple[Tensor, ...]:
        rows = G.flatten(0, -2)
        of_weight = rows.mT @ (normed * scale + shift).to(G.dtype).flatten(0, -2)
        of_output = (G @ weight).to(scale.dtype)
        of_scale, of_shift = (of_output * normed).flatten(0, -2).sum(0), of_output.flatten(0, -2).sum(0)
        g = of_output * scale
        along = normed * (g * normed).mean(-1, keepdim=True)
        of_x = (g - g.mean(-1, keepdim=True) - along) * inverse
        return of_x.to(G.dtype), of_scale, of_shift, of_weight, rows.sum(0)

    y = F.linear((normed * scale.detach() + shift.detach()).to(x.dtype), weight.detach(), bias.detach())
    return attach(y, [x, scale, shift, weight, bias], [normed.to(x.dtype), inverse, scale, shift, weight], gradient)
