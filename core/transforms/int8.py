"""Activations kept as 8 bits: the inputs of a block's linear maps, and GELU's slopes.

Mesa (Pan et al. 2021, arXiv 2111.11124) and ActNN (Chen et al., ICML 2021, arXiv 2104.14129). Contract: unbiased
gradient. Values and input gradients of the maps are exact; weight gradients read inputs that were rounded up or down at
random. Of GELU its slope is kept and not its input, as in Mesa: the gradient is linear in a slope, but not in an input,
of which 8 bits would be a bias. A block keeps 11 u · (1/4 + 2/group) instead of 11 u in float32 (u = B·N·D elements).
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from core import layers, rng
from core.attached import PARTS, attach
from core.errors import InputError
from core.ops import Rewrite, Site, rewrite

_GOLDEN = (5**0.5 - 1) / 2


def int8(group: int = 256) -> Rewrite:
    """Keep 8 bits an element, and the least value and the step of every group of at most `group` neighbours, the fewest
    groups that a row can be cut into.

    Called without a key nothing is rounded, and every gradient is exact. proj's input is left as it is under fused
    attention, which keeps it anyway. Raises InputError for a group below 2.
    """
    if group < 2:
        raise InputError(f"int8 group {group} is too small: at least 2, such as 256")

    def linear(site: Site, before: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        key = site.key("int8")
        if key is None or (site.name == "attn.proj" and site.ops.replaces("attend")):
            return layers.linear(site, before, *inputs)
        first, second = rng.split(key, 2)
        x = sloped(before, *inputs, group=group, key=first) if site.name == "mlp.fc2" else before(*inputs)
        weight, bias = site.affine(x.dtype)
        width = x.shape[-1]

        def gradient(G: Tensor, *packed: Tensor) -> tuple[Tensor]:
            return (G.flatten(0, -2).mT @ unpack(packed, width, G.dtype).flatten(0, -2),)

        return attach(F.linear(x, weight.detach(), bias), [weight], pack(x.detach(), group, second), gradient)

    return rewrite("int8", replace={"linear": linear}, at=layers.MAPS)


def sloped(before: Callable[..., Tensor], y: Tensor, *rest: Tensor, group: int, key: Tensor) -> Tensor:
    """before(y, *rest), a function of each element of y by itself, with its slopes kept as 8 bits."""
    x = torch.empty_like(y)

    def slope(x: Tensor, y: Tensor, *rest: Tensor) -> Tensor:
        value, pull, *_ = torch.func.vjp(lambda y: before(y, *rest), y)
        x.copy_(value)
        return pull(torch.ones_like(value))[0]

    def gradient(G: Tensor, *packed: Tensor) -> tuple[Tensor]:
        return (G * unpack(packed, G.shape[-1], G.dtype),)

    slopes = map(slope, *(_parts(t) for t in (x, y.detach(), *rest)))
    return attach(x, [y], _packed(slopes, x.shape, group, key), gradient)


def pack(x: Tensor, group: int, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [...,D] -> codes uint8 [...,n,g], least value and step [...,n,1]: n = ceil(D / group) groups, g = ceil(D / n),
    the last one filled up with the row's last element.

    The mean of `unpack` over keys is x. One uniform draw a group is turned by multiples of the golden ratio (Cranley
    and Patterson 1976): every element's draw is uniform, neighbours round apart, and it costs 1/g of a draw each.
    """
    return _packed(_parts(x), x.shape, group, key)


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    return x.chunk(1 if torch.compiler.is_compiling() else PARTS)  # a compiler fuses them


def _packed(parts: Iterable[Tensor], shape: Sequence[int], group: int, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = -(-shape[-1] // group)
    width = -(-shape[-1] // groups)
    more = groups * width - shape[-1]
    draws = rng.uniform(key, (*shape[:-1], groups, 1))
    turns = (_GOLDEN * torch.arange(width, device=key.device)).frac_()

    def one(x: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        x = torch.cat((x, x[..., -1:].expand(*x.shape[:-1], more)), -1) if more else x
        x = x.unflatten(-1, (groups, width))
        low = x.amin(-1, keepdim=True).to(wide)
        step = ((x.amax(-1, keepdim=True) - low) / 255).clamp_min(torch.finfo(wide).tiny)
        codes = (x - low).div_(step).add_((draws + turns).frac_()).clamp_max_(255).to(torch.uint8)
        return codes, low, step

    codes, low, step = zip(*map(one, parts, _parts(draws)), strict=True)
    return torch.cat(codes), torch.cat(low), torch.cat(step)


def unpack(packed: Sequence[Tensor], width: int, dtype: torch.dtype) -> Tensor:
    """What `pack` packed, [...,width]."""
    codes, low, step = packed
    return torch.addcmul(low, codes, step).flatten(-2)[..., :width].to(dtype)
