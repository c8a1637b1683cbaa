"""The registry of training optimizations: each is one file here and one line in REGISTRY.

Registering makes it an arm of the study (its name, or name@value for its first parameter) and puts it
through tests/laws.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from core.ops import Rewrite
from core.transforms.budget import budget
from core.transforms.crs import crs
from core.transforms.decatt import decatt
from core.transforms.dropit import dropit
from core.transforms.droppath import droppath
from core.transforms.flash import flash
from core.transforms.int8 import int8
from core.transforms.layerscale import layerscale
from core.transforms.lora import lora
from core.transforms.lowbp import lowbp
from core.transforms.mrt import mrt, selector, uniform
from core.transforms.muon import muon
from core.transforms.patchdrop import patchdrop
from core.transforms.qknorm import qknorm
from core.transforms.readout import readout
from core.transforms.recompute import recompute
from core.transforms.registers import registers
from core.transforms.tome import tome

Contract = Literal["exact", "unbiased gradient", "biased gradient", "changes the objective", "changes the update"]


@dataclass(frozen=True)
class Transform:
    """A registered optimization.

    build: keyword parameters -> (Ops -> Ops). contract: what it promises of loss and gradient; tests/laws.py holds it
    to that. about: one line for listings. identity: parameters under which it changes nothing, if there are any.
    levels: values of the first parameter that the full lattice runs; () runs the defaults.
    settings: further parameters that presets and groups use, for the laws.
    control: the name of the registered optimization that does the same by simpler means, which it must beat.
    layout: parameters -> (images -> (images as it sees them, patches [B,L,3])), if it chooses patches.
    lattice: whether it is a factor of the full lattice (unless a control); else it is of the group `more`.
    pretrained: whether it makes sense from pretrained weights alone.
    bias: of a biased gradient the bound of its mean's relative error, on the laws' model.
    """

    build: Callable[..., Rewrite]
    contract: Contract
    about: str
    identity: dict[str, Any] | None = None
    levels: tuple[Any, ...] = ()
    settings: tuple[dict[str, Any], ...] = ()
    control: str | None = None
    layout: Callable[..., Callable[[Tensor], tuple[Tensor, Tensor]]] | None = None
    lattice: bool = True
    pretrained: bool = False
    bias: float = 0.0


REGISTRY: dict[str, Transform] = {
    "flash": Transform(
        flash,
        "exact",
        "FlashAttention: fused, exact, no N x N matrix",
        settings=({"backend": "tiled"},),
    ),
    "decatt": Transform(
        decatt,
        "changes the objective",
        "DeCAtt: penalty on correlated heads",
        identity={"weight": 0.0},
        settings=({"weight": 150.0, "norm": "frobenius"}, {"layers": (0, -1)}),
    ),
    "mrt": Transform(
        mrt,
        "changes the objective",
        "mixed-resolution tokens: large patches where little happens",
        settings=(
            {"scorer": "random"},
            {"scorer": "entropy"},
            {"scorer": "features", "image": 64, "tokens": 16, "min_patch": 8, "max_patch": 32, "patch_norm": True},
        ),
        control="uniform",
        layout=selector,
    ),
    "crs": Transform(
        crs,
        "unbiased gradient",
        "column-row sampling: weight gradients from a share of the rows",
        identity={"ratio": 1.0},
        levels=(0.5, 0.3),
        settings=(
            {"ratio": 0.5, "scope": "published"},
            {"ratio": 0.5, "estimator": "systematic"},
            {"ratio": 0.5, "estimator": "plain", "keep_cls": False},
        ),
        control="recompute",
    ),
    "recompute": Transform(
        recompute,
        "exact",
        "control for crs: LayerNorm and GELU outputs rebuilt in the backward pass",
        settings=({"fc1": True},),
    ),
    "uniform": Transform(
        uniform,
        "changes the objective",
        "control for mrt: uniform patches with its sinusoidal positions",
        settings=({"patch": 8, "image": 64},),
    ),
    "readout": Transform(readout, "exact", "the last block for the class token alone", lattice=False),
    "droppath": Transform(
        droppath, "changes the objective", "branches left out, more often the deeper", {"rate": 0.0}, lattice=False
    ),
    "patchdrop": Transform(
        patchdrop, "changes the objective", "training on a share of the patches", {"share": 0.0}, lattice=False
    ),
    "tome": Transform(tome, "changes the objective", "similar tokens merged in every block", {"r": 0}, lattice=False),
    "registers": Transform(
        registers, "changes the objective", "learned tokens beside the patches", {"count": 0}, lattice=False
    ),
    "qknorm": Transform(qknorm, "changes the objective", "normalised queries and keys", lattice=False),
    "layerscale": Transform(layerscale, "changes the objective", "a learned scale of each branch", lattice=False),
    "lora": Transform(
        lora, "changes the objective", "low-rank updates, the rest frozen", lattice=False, pretrained=True
    ),
    "muon": Transform(muon, "changes the update", "orthogonalised momentum for the blocks' matrices", lattice=False),
    "int8": Transform(
        int8,
        "unbiased gradient",
        "inputs of linear maps and slopes of GELU kept as 8 bits, rounded at random",
        control="recompute",
        lattice=False,
    ),
    "lowbp": Transform(
        lowbp,
        "biased gradient",
        "GELU's derivative from 2 bits, LayerNorm sharing what it keeps with the next map",
        settings=({"norms": False},),
        control="recompute",
        lattice=False,
        bias=0.4,
    ),
    "dropit": Transform(
        dropit,
        "biased gradient",
        "weight gradients from the largest elements of a map's input",
        identity={"rate": 0.0},
        settings=({"rate": 0.9},),
        control="recompute",
        lattice=False,
        bias=0.3,
    ),
    "budget": Transform(
        budget,
        "exact",
        "recomputation chosen tensor by tensor, so that a step's peak is at most the size",
        settings=(
            {"plan": (("norm1", "weights", "norm2"), ("gelu",))},
            {"plan": (("block",),)},
        ),
        control="recompute",
        lattice=False,
    ),
}


def controls() -> set[str]:
    """The names of the comparisons that others must beat: arms, but not of the full lattice."""
    return {transform.control for transform in REGISTRY.values() if transform.control}
