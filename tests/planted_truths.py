"""Optimizations whose truth is known, for a study to find: docs/measuring.md, "Planted truths"."""

import torch

from core import rng
from core.ops import rewrite
from core.transforms.registry import Transform


def busy(products: int = 8):
    """So many products more in every MLP, thrown away. In eager mode alone: a compiler would leave them out."""

    def mlp(inner, site, x):
        with torch.no_grad():
            for _ in range(products):
                x.detach() @ site.params["mlp.fc1.weight"].mT
        return inner(site, x)

    return rewrite("busy", wrap={"mlp": mlp})


def mislabelled(share: float = 0.3):
    """In training, the logits of a share of a batch's images are those of others of it, as if labels were shuffled."""

    def readout(inner, site, x):
        logits, key = inner(site, x), site.key("mislabelled")
        if key is None:
            return logits
        chosen = rng.permutation(key, len(logits))[: round(share * len(logits))]
        return logits.index_copy(0, chosen, logits[chosen.roll(1)])

    return rewrite("mislabelled", wrap={"readout": readout})


def idle():
    """Nothing."""
    return rewrite("idle", wrap={"mlp": lambda inner, site, x: inner(site, x)})


TRANSFORMS = {
    "busy": Transform(busy, "exact", "more work for nothing", lattice=False),
    "mislabelled": Transform(mislabelled, "changes the objective", "wrong labels", lattice=False),
    "idle": Transform(idle, "exact", "nothing", lattice=False),
}
