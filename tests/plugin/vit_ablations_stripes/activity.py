"""Activation regularization: a penalty on large head outputs (Merity et al. 2017, arXiv 1708.01009)."""

from collections.abc import Callable

from torch import Tensor

from core.ops import Rewrite, Site, rewrite
from core.transforms.registry import Transform


def activity(weight: float = 0.01) -> Rewrite:
    """weight: of the mean square."""

    def penalty(inner: Callable[..., Tensor], site: Site, heads: Tensor) -> Tensor:
        return inner(site, heads) + weight * heads.square().mean() / site.config.depth

    return rewrite("activity", wrap={"penalty": penalty}) if weight else lambda ops: ops


ACTIVITY = Transform(
    activity, "changes the objective", "penalty on large head outputs", identity={"weight": 0.0}, lattice=False
)
TRANSFORMS = {"activity": ACTIVITY}
