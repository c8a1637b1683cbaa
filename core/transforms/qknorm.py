"""QK-norm: LayerNorm of every query and key, with learned scales (Henry et al. 2020, arXiv 2010.04245; as in ViT-22B,
Dehghani et al., ICML 2023, arXiv 2302.05442: without shifts).

Contract: changes the objective. Control: the baseline.
"""

from collections.abc import Callable
from math import isfinite

import torch.nn.functional as F
from torch import Tensor

from core.errors import InputError
from core.ops import Parameter, Rewrite, Site, rewrite


def qknorm(scale: float = 1.0) -> Rewrite:
    """scale: the initial value of the two scales [d] of a block, which its heads share. InputError for one that is not
    finite."""
    if not isfinite(scale):
        raise InputError(f"qknorm scale {scale} must be finite, such as 1")
    return rewrite(
        "qknorm",
        wrap={"attend": attend},
        parameters=lambda config: {
            f"blocks.{i}.attn.qknorm.{name}": Parameter((config.width // config.heads,), scale)
            for i in range(config.depth)
            for name in "qk"
        },
    )


def attend(inner: Callable[..., Tensor], site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of normalised q and k [B,h,N,d]."""
    q, k = (normalized(site, name, t) for name, t in (("q", q), ("k", k)))
    return inner(site, q, k, v)


def normalized(site: Site, name: str, x: Tensor) -> Tensor:
    """LayerNorm over the last axis in the precision of its scale, returned in that of x."""
    scale = site.params[f"{site.name}.qknorm.{name}"]
    if x.shape[-1] != len(scale):
        raise InputError(
            f"qknorm scales heads {len(scale)} wide, and this model has some {x.shape[-1]} wide; leave qknorm out"
        )
    return F.layer_norm(x.to(scale.dtype), scale.shape, scale, None, site.config.eps).to(x.dtype)
