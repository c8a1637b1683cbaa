"""LoRA: low-rank updates W + B A of the maps qkv and proj; all but these and the head is frozen (Hu et al., ICLR 2022,
arXiv 2106.09685, with alpha = rank).

Contract: changes the objective. For pretrained weights. Control: the baseline, which trains all.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from core.errors import InputError
from core.initializers import uniform
from core.ops import Parameter, Rewrite, Site, rewrite

if TYPE_CHECKING:
    from core.vit import VitConfig

MAPS = {"attn.qkv": 3, "attn.proj": 1}  # outputs in units of the width


def lora(rank: int = 4) -> Rewrite:
    """rank: rows of A. B starts at zero, so the first loss is the model's own.

    Raises InputError for a rank below 1 and, for a model, for one above its width.
    """
    if rank < 1:
        raise InputError(f"lora rank {rank} is too small: at least 1")

    def parameters(config: "VitConfig") -> dict[str, Parameter]:
        D = config.width
        if rank > D:
            raise InputError(f"lora rank {rank} is above the model's width {D}; legal: 1 to {D}")
        out = {}
        for name, outputs in ((f"blocks.{i}.{m}.lora", n) for i in range(config.depth) for m, n in MAPS.items()):
            out[f"{name}.A"] = Parameter((rank, D), uniform(D**-0.5))
            out[f"{name}.B"] = Parameter((outputs * D, rank))
        return out

    def frozen(name: str) -> bool:
        return ".lora." not in name and not name.startswith("head.")

    return rewrite("lora", wrap={"linear": linear}, at=tuple(MAPS), parameters=parameters, frozen=frozen)


def linear(inner: Callable[..., Tensor], site: Site, before: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The map of before(*inputs), and the update's of it."""
    y, x = inner(site, before, *inputs), before(*inputs)  # twice, for what replaces the map may do both by itself
    A, B = (site.params[f"{site.name}.lora.{name}"].to(x.dtype) for name in "AB")
    if (own := (x.shape[-1], y.shape[-1])) != (wanted := (A.shape[-1], len(B))):
        raise InputError(
            f"lora updates a map {site.name} of {wanted[0]} inputs and {wanted[1]} outputs, and this model's has "
            f"{own[0]} and {own[1]}; leave lora out"
        )
    return y + F.linear(F.linear(x, A), B)
