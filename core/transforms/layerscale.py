"""LayerScale: each branch times a learned scale, small at first (Touvron et al., ICCV 2021, arXiv 2103.17239).

Contract: changes the objective. Control: the baseline.
"""

from collections.abc import Callable
from math import isfinite

from torch import Tensor

from core.errors import InputError
from core.ops import Carry, Parameter, Rewrite, Site, rewrite


def layerscale(initial: float = 1e-5) -> Rewrite:
    """initial: value of the two scales [D] of a block. Raises InputError for one that is not finite."""
    if not isfinite(initial):
        raise InputError(f"layerscale initial {initial} must be finite, such as 1e-5")
    return rewrite(
        "layerscale",
        wrap={"attention": attention, "mlp": mlp},
        parameters=lambda config: {
            f"blocks.{i}.layerscale.{branch}": Parameter((config.width,), initial)
            for i in range(config.depth)
            for branch in ("attn", "mlp")
        },
    )


def attention(inner: Callable[..., tuple[Tensor, Carry]], site: Site, x: Tensor) -> tuple[Tensor, Carry]:
    """The first branch, scaled."""
    branch, carry = inner(site, x)
    return branch * site.params["layerscale.attn"].to(branch.dtype), carry


def mlp(inner: Callable[..., Tensor], site: Site, x: Tensor) -> Tensor:
    """The second branch, scaled."""
    branch = inner(site, x)
    return branch * site.params["layerscale.mlp"].to(branch.dtype)
