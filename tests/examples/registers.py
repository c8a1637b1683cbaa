"""Registers (Darcet et al., ICLR 2024, arXiv 2309.16588): learned tokens beside the patches, read by nobody at last."""

import torch

from core.ops import Parameter, Rewrite, rewrite
from core.vit import normal


def registers(count: int = 4) -> Rewrite:
    """count: how many tokens, at the end of the sequence."""

    def tokenize(inner, site, images):
        tokens = inner(site, images)
        extra = site.params["registers"].to(tokens.dtype)
        return torch.cat((tokens, extra.expand(len(tokens), -1, -1)), dim=1)

    if count == 0:
        return lambda ops: ops
    return rewrite(
        "registers",
        wrap={"tokenize": tokenize},
        parameters=lambda config: {"registers": Parameter((1, count, config.width), normal(0.02))},
    )
