"""The registry of training optimizations: each is one file here and one line in REGISTRY.

Registering makes it an arm of the study (its name, or name@value for its first parameter) and puts it
through tests/laws.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from core.ops import Rewrite
from core.transforms.decatt import decatt
from core.transforms.flash import flash

Contract = Literal["exact", "unbiased gradient", "changes the objective"]


@dataclass(frozen=True)
class Transform:
    """A registered optimization.

    build: keyword parameters -> (Ops -> Ops). field: the field of Ops it rewrites.
    contract: what it promises of loss and gradient; tests/laws.py holds it to that.
    about: one line for listings. identity: parameters under which it changes nothing, if there are any.
    levels: values of the first parameter that the full lattice runs; () runs the defaults.
    """

    build: Callable[..., Rewrite]
    field: str
    contract: Contract
    about: str
    identity: dict[str, Any] | None = None
    levels: tuple[Any, ...] = ()


REGISTRY: dict[str, Transform] = {
    "flash": Transform(flash, "attend", "exact", "FlashAttention: fused, exact, no N x N matrix"),
    "decatt": Transform(
        decatt, "penalty", "changes the objective", "DeCAtt: penalty on correlated heads", {"weight": 0.0}
    ),
}
