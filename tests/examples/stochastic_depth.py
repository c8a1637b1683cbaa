"""Stochastic depth (Huang et al., ECCV 2016): a branch is left out with a probability that rises with depth."""

from core import rng
from core.ops import Rewrite, rewrite


def stochastic_depth(rate: float = 0.5) -> Rewrite:
    """rate: the last block's probability; one draw an image and branch, the rest rescaled."""

    def dropped(site, branch):
        probability = rate * site.block / max(site.config.depth - 1, 1)
        key = site.key("stochastic depth")
        if key is None or probability == 0:
            return branch
        keep = rng.bernoulli(key, (len(branch), 1, 1), 1 - probability)
        return branch * keep / (1 - probability)

    def attention(inner, site, x):
        branch, carry = inner(site, x)
        return dropped(site.child("attn"), branch), carry

    def mlp(inner, site, x):
        return dropped(site.child("mlp"), inner(site, x))

    if rate == 0:
        return lambda ops: ops
    return rewrite("stochastic_depth", wrap={"attention": attention, "mlp": mlp}, positional=True)
