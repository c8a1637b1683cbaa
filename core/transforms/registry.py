"""The registry of training optimizations: each is one file here and one line in REGISTRY.

Registering makes it an arm of the study (its name, or name@value for its first parameter) and puts it
through tests/laws.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from core.ops import Rewrite
from core.transforms import mrt as mixed
from core.transforms.crs import crs
from core.transforms.decatt import decatt
from core.transforms.flash import flash
from core.transforms.mrt import mrt, uniform
from core.transforms.recompute import recompute

Contract = Literal["exact", "unbiased gradient", "changes the objective"]


@dataclass(frozen=True)
class Transform:
    """A registered optimization.

    build: keyword parameters -> (Ops -> Ops). field: the field of Ops it rewrites.
    contract: what it promises of loss and gradient; tests/laws.py holds it to that.
    about: one line for listings. identity: parameters under which it changes nothing, if there are any.
    levels: values of the first parameter that the full lattice runs; () runs the defaults.
    control: the name of the registered optimization that does the same by simpler means, which it must beat.
    shape: parameters -> fields that the model's VitConfig must have under it, if any.
    remembers: parameters -> whether it needs the gradient norms of an image's last visit (see ops.Site).
    layout: parameters -> (images -> (images as it sees them, patches [B,L,3])), if it chooses patches.
    """

    build: Callable[..., Rewrite]
    field: str
    contract: Contract
    about: str
    identity: dict[str, Any] | None = None
    levels: tuple[Any, ...] = ()
    control: str | None = None
    shape: Callable[..., dict[str, Any]] | None = None
    remembers: Callable[..., bool] | None = None
    layout: Callable[..., Callable[[Tensor], tuple[Tensor, Tensor]]] | None = None


REGISTRY: dict[str, Transform] = {
    "flash": Transform(flash, "attend", "exact", "FlashAttention: fused, exact, no N x N matrix"),
    "decatt": Transform(
        decatt, "penalty", "changes the objective", "DeCAtt: penalty on correlated heads", {"weight": 0.0}
    ),
    "mrt": Transform(
        mrt,
        "tokenize",
        "changes the objective",
        "mixed-resolution tokens: large patches where little happens",
        control="uniform",
        shape=mixed.shape,
        layout=mixed.selector,
    ),
    "crs": Transform(
        crs,
        "linear",
        "unbiased gradient",
        "column-row sampling: weight gradients from a share of the rows",
        {"ratio": 1.0},
        levels=(0.5, 0.3),
        control="recompute",
        remembers=lambda norms, **_: norms == "cached",
    ),
    "recompute": Transform(
        recompute,
        "linear",
        "exact",
        "control for crs: LayerNorm and GELU outputs rebuilt in the backward pass",
    ),
    "uniform": Transform(
        uniform,
        "tokenize",
        "changes the objective",
        "control for mrt: uniform patches with its sinusoidal positions",
        shape=lambda patch, image: mixed.shape(patch, image, None),
    ),
}


def controls() -> set[str]:
    """The names of the comparisons that others must beat: arms, but not of the full lattice."""
    return {transform.control for transform in REGISTRY.values() if transform.control}
