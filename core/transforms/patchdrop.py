"""PatchDropout: training on a share of the patches, drawn anew each step (Liu et al., WACV 2023, arXiv 2208.07220).

Contract: changes the objective. Evaluation sees all patches. Control: the baseline.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from core import rng
from core.errors import InputError
from core.ops import Rewrite, Site, rewrite


def patchdrop(share: float = 0.5) -> Rewrite:
    """share: of the N patches are dropped; max(1, floor(N · (1 - share))) are kept of every image, and the class token.

    Without a key (as in evaluation) none is dropped. Raises InputError for a share outside [0, 1).
    """
    if not 0 <= share < 1:
        raise InputError(f"patchdrop share {share} is outside [0, 1): write the share of patches to drop, such as 0.5")

    def tokenize(inner: Callable[..., Tensor], site: Site, images: Tensor) -> Tensor:
        tokens, key = inner(site, images), site.key("patchdrop")
        if key is None:
            return tokens
        B, N, D = len(tokens), tokens.shape[1] - 1, tokens.shape[2]
        kept = max(1, int(N * (1 - share)))
        chosen = rng.uniform(key, (B, N)).argsort(dim=1, stable=True)[:, :kept] + 1
        return torch.cat((tokens[:, :1], tokens.gather(1, chosen[..., None].expand(-1, -1, D))), 1)

    if share == 0:
        return lambda ops: ops
    return rewrite("patchdrop", wrap={"tokenize": tokenize}, innermost=True)  # tokens that others add are no patches
