"""What a module is tried for before a transform relies on it: in float64, and at parameters away from their initial
values, at which several modules ignore their blocks."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from core import layers, rng
from core.foreign import places
from core.foreign.forward import PATCHES, PLAIN, TOKENS, forward
from core.foreign.model import Foreign, trained
from core.foreign.readout import readout
from core.ops import Ops, Params, Site, rewrite
from core.vit import VitConfig


@lru_cache(maxsize=8)
def branches(config: Foreign) -> bool:
    """Whether every block is y = x + a(x) and then y + b(y), or alike, a and b ending in the maps that are said to end
    the branches: without both it is x, and what one of them adds grows as that map's output is scaled, by images."""
    scale: dict[str, float | Tensor] = {"attention": 1.0, "mlp": 1.0}
    found = []
    ops = rewrite(
        "trial",
        wrap={
            "attention": lambda inner, site, branch: (scale["attention"] * branch, {}),
            "mlp": lambda inner, site, branch: scale["mlp"] * branch,
        },
    )(PLAIN)

    def watch(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))

        def added(attention: float | Tensor, mlp: float | Tensor) -> Tensor:
            scale.update(attention=attention, mlp=mlp)
            y = block.forward(*args, **kwargs)
            scale.update(attention=1.0, mlp=1.0)
            return (y[0] if isinstance(y, tuple) else y) - x

        by_image = torch.tensor([2.0, 3.0], dtype=x.dtype, device=x.device)[:, None, None]
        alone = [(added(1, 0), added(by_image, 0)), (added(0, 1), added(0, by_image))]
        grown = (one.any() and torch.allclose(scaled, by_image * one, 1e-9, 1e-10) for one, scaled in alone)
        found.append(bool(not added(0, 0).any() and all(grown)))

    blocks = config.module.get_submodule(places.blocks(config.module))
    hooks = [block.register_forward_hook(watch, with_kwargs=True) for block in blocks.children()]
    try:
        return _logits(config, ops) is not None and len(found) == config.depth and all(found)
    finally:
        for hook in hooks:
            hook.remove()


@lru_cache(maxsize=8)
def class_token(config: Foreign) -> bool:
    """Whether of all that the last block makes the class token alone is read."""
    last = any(place.ends for place in config.places.values() if place.block == config.depth - 1)
    return last and _equal(_logits(config, readout(PLAIN)), _logits(config, PLAIN))


@lru_cache(maxsize=8)
def tokenizer(config: Foreign) -> VitConfig | None:
    """The shape of our own ViT whose tokenizer the module has: patches by one convolution, learned positions added, a
    class token. And nothing else minds the order of tokens: what it is tried with is the reverse."""
    own = trained(config.module)
    if not {*TOKENS} <= own.keys() or own[PATCHES[0]].dim() != 4:
        return None
    width, channels, patch, _ = own[PATCHES[0]].shape
    if config.image % patch:
        return None
    ours = VitConfig(config.image, patch, width, config.depth, 1, 1, config.shape.classes, channels)

    def backwards(site: Site, images: Tensor) -> Tensor:
        site = site._replace(config=ours, params={**site.params, "pos_embed": site.params["pos_embed"] * 0})
        return layers.tokenize(site, images).flip(1).roll(1, 1)

    nowhere = {"pos_embed": torch.zeros_like(own["pos_embed"], dtype=torch.float64)}
    reverse = rewrite("trial", replace={"tokenize": backwards})(PLAIN)
    return ours if _equal(_logits(config, reverse), _logits(config, PLAIN, nowhere)) else None


def _equal(logits: Tensor | None, expected: Tensor | None) -> bool:
    return logits is not None and expected is not None and torch.allclose(logits, expected, 1e-9, 1e-10)


def _logits(config: Foreign, ops: Ops, changed: Params | None = None) -> Tensor | None:
    """Of two images; None where the module cannot do with what the transforms make."""
    key = rng.key(1)
    params = {
        name: p.double() + 0.1 * (rng.uniform(rng.named(key, name), p.shape, p.device).double() - 0.5)
        for name, p in trained(config.module).items()
    }
    device = next(iter(params.values())).device
    images = rng.uniform(key, (2, config.channels, config.image, config.image), device).double() * 2 - 1
    with torch.no_grad():
        try:
            return forward(params | (changed or {}), images, config, ops, None, torch.float64)[0]
        except Exception:
            return None
