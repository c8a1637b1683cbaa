"""Stochastic depth: branches are left out at random, more often the deeper (Huang et al., ECCV 2016, arXiv 1603.09382).

Contract: changes the objective. One draw an image and branch; what is kept is rescaled, so that its mean is the branch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from core import rng
from core.errors import InputError
from core.ops import Carry, Rewrite, Site, rewrite


def droppath(rate: float = 0.1) -> Rewrite:
    """rate: the last block's probability, to which it rises linearly from the first one's 0 (timm's rule).

    Raises InputError for a rate outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise InputError(f"droppath rate {rate} is outside [0, 1): write the last block's probability, such as 0.1")

    def dropped(site: Site, branch: Tensor) -> Tensor:
        key = site.key("droppath")
        if key is None:
            return branch
        kept = 1 - depth_of(site, branch) * (rate / max(site.config.depth - 1, 1))
        draws = rng.uniform(key, (len(branch), 1, 1))
        return branch * ((draws < kept) / kept).to(branch.dtype)

    def attention(inner: Callable[..., tuple[Tensor, Carry]], site: Site, x: Tensor) -> tuple[Tensor, Carry]:
        branch, carry = inner(site, x)
        return dropped(site.child("attn"), branch), carry | {"droppath": depth_of(site, x) + 1}

    def mlp(inner: Callable[..., Tensor], site: Site, x: Tensor) -> Tensor:
        return dropped(site.child("mlp"), inner(site, x))

    return rewrite("droppath", wrap={"attention": attention, "mlp": mlp}) if rate else lambda ops: ops


def depth_of(site: Site, x: Tensor) -> Tensor:
    """How many blocks were before this one, 0-d float64: told as a tensor, all blocks but the first stay one function
    to a compiler. Where nobody tells, its number does."""
    return site.carry.get("droppath", torch.full((), site.block or 0, dtype=torch.float64, device=x.device))
