"""Registers: learned tokens beside the patches, read by nobody at last (Darcet et al., ICLR 2024, arXiv 2309.16588).

Contract: changes the objective. Control: the baseline.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from core.errors import InputError
from core.initializers import normal
from core.ops import Parameter, Rewrite, Site, rewrite


def registers(count: int = 4) -> Rewrite:
    """count: how many tokens, without positions, at the end of the sequence. Raises InputError for one below 0."""
    if count < 0:
        raise InputError(f"registers count {count} is too small: at least 0")

    def tokenize(inner: Callable[..., Tensor], site: Site, images: Tensor) -> Tensor:
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
