"""QK-norm (Henry et al. 2020, arXiv 2010.04245): q and k of length 1, their product times a learned scale a head."""

import torch.nn.functional as F

from core.ops import Parameter, Rewrite, rewrite


def qk_norm(scale: float = 10.0) -> Rewrite:
    """scale: its initial value."""

    def attend(inner, site, q, k, v):
        g = site.params["attn.qk_norm"].to(q.dtype)[:, None, None] * q.shape[-1] ** 0.5  # attention divides by it
        return inner(site, F.normalize(q, dim=-1) * g, F.normalize(k, dim=-1), v)

    return rewrite(
        "qk_norm",
        wrap={"attend": attend},
        parameters=lambda config: {
            f"blocks.{i}.attn.qk_norm": Parameter((config.heads,), scale) for i in range(config.depth)
        },
    )
