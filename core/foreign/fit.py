"""Transforms as a module of others takes them, or their refusal by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from core.errors import InputError
from core.foreign import trials
from core.foreign.forward import PLAIN
from core.foreign.model import Foreign, split
from core.foreign.readout import readout
from core.ops import SITES, Ops, Params, Part, composed
from core.optimizers import Around
from core.vit import VitConfig

REACHED = ("linear", "norm", "attend", "observe", "penalty")
INSTEAD = "leave it out, or use our own model (without --model)"
_TOKENS = " (it has not the patches, learned positions and class token of timm's VisionTransformer)"
HINTS = {
    "mrt": _TOKENS,
    "uniform": _TOKENS,
    "droppath": " (its blocks are not x plus the branches of attention and MLP)",
    "budget": " (recompute is)",
    "registers": " (--model timm:vit_small_patch14_reg4_dinov2 has its own)",
    "layerscale": " (--model timm:deit3_small_patch16_224 has its own)",
}


def fit(ops: Ops, config: Foreign) -> Ops:
    """The transforms as this module takes them: over its own attention, asked about parameters by our names.

    Raises InputError for a transform of something that the module's calls of torch do not show.
    """
    parts = [_fitted(part, config) for part in ops.parts]
    return composed(PLAIN, tuple(sorted(parts, key=lambda part: part.name == "readout")))  # others see its class token


def _fitted(part: Part, config: Foreign) -> Part:
    if part.name == "readout":
        if not trials.class_token(config):
            raise InputError(
                f"readout computes the last block for the class token alone, and {config} reads other tokens too, or "
                f"has no such block; {INSTEAD}"
            )
        return readout(PLAIN).parts[0]
    _refuse(part, config)
    if "tokenize" in part.replace and (ours := trials.tokenizer(config)):
        part = _tokenizing(part, config, ours)
    return _renamed(part, config.ours)


def _tokenizing(part: Part, config: Foreign, ours: VitConfig) -> Part:
    """The part, which sees our own model of this shape."""
    tokenize, wanted = part.replace["tokenize"], part.config(ours) if part.config else ours
    for field in ("patch", "patch_norm"):
        if (value := getattr(wanted, field)) != (has := getattr(ours, field)):
            raise InputError(
                f"{part.name} wants {field}={value}, and {config} has {field}={has}; pass its own, such as --set "
                f"mrt.min_patch={ours.patch} or uniform.patch={ours.patch}"
            )
    new = {**part.replace, "tokenize": lambda site, images: tokenize(site._replace(config=ours), images)}
    return replace(part, replace=new)


def _renamed(part: Part, ours: Mapping[str, str]) -> Part:
    """The part, asked about parameters by our names."""
    frozen, optimizer = part.frozen, part.optimizer
    return replace(
        part,
        frozen=frozen and (lambda name: frozen(ours.get(name, name))),
        optimizer=optimizer and (lambda rest: _Renamed(optimizer(rest), ours)),
    )


@dataclass(frozen=True)
class _Renamed(Around):
    """An optimizer that sees parameters by our names."""

    ours: Mapping[str, str]

    def init(self, params: Params) -> Any:
        return self.inner.init(self._renamed(params))

    def update(self, params: Params, gradients: Params, state: Any, step: Tensor) -> tuple[Params, Any]:
        new, state = self.inner.update(self._renamed(params), self._renamed(gradients), state, step)
        return {name: new[self.ours.get(name, name)] for name in params}, state

    def _renamed(self, tree: Params) -> Params:
        return {self.ours.get(name, name): tensor for name, tensor in tree.items()}


def _refuse(part: Part, config: Foreign) -> None:
    changed = (*part.replace, *part.wrap)
    reached = {*REACHED}
    # of all transforms that wrap a branch, this one is known to change what leaves it, and nothing that enters
    reached |= {"attention", "mlp"} if part.name == "droppath" and trials.branches(config) else set()
    reached |= {"tokenize", "config"} if "tokenize" in part.replace and trials.tokenizer(config) else set()
    asked = (*changed, *(["config"] if part.config else []), *(["block"] if part.plan else []))
    if hidden := [primitive for primitive in asked if primitive not in reached]:
        raise InputError(
            f"{part.name} changes the model's {hidden[0]}, which is not reached in {config}{HINTS.get(part.name, '')}; "
            f"{INSTEAD}"
        )
    if "attend" in changed and not config.reached["attend"]:
        masked = config.reached["masked"]
        others = f" (it has {masked} with a mask, or other shapes)" if masked else ""
        raise InputError(
            f"{part.name} changes the model's attend, and {config} calls no plain F.scaled_dot_product_attention"
            f"{others}; {INSTEAD}"
        )
    if {"observe", "penalty"} & {*changed} and not config.reached["attend"] + config.reached["masked"]:
        raise InputError(f"{part.name} reads attention heads, and {config} shows none; {INSTEAD}")
    roles = Counter((place.block, place.role) for place in config.places.values())
    if {"linear", "norm"} & {*changed} and part.at is not None and not {role for _, role in roles} & {*part.at}:
        raise InputError(f"{part.name} changes {', '.join(part.at)}, and {config} has none of them; {INSTEAD}")
    for name in part.parameters(config.shape) if part.parameters else ():  # type: ignore[arg-type]
        block, rest = split(name)
        role = next((role for role in SITES if rest.startswith(f"{role}.")), None)
        if block is None or roles[block, role] != 1 if role else not rest.startswith("attn."):
            raise InputError(f"{part.name} brings {name}, for which {config} has no single map or norm; {INSTEAD}")
