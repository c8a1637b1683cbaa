"""Models of others under an arm, in float64: their names, and how one is run."""

import torch

from ablations.study.arms import parse
from core import model, rng
from core.step import objective, value_and_grad

TIMM = (
    "vit_tiny_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_siglip_224",
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
    "vit_small_patch16_rope_224",
)
NAMES = (*(f"timm:{name}" for name in TIMM), "hf:vit", "hf:dinov2", "hand_written")
CLASSES, IMAGE = 5, 28
MRT = {"mrt": {"min_patch": 16, "max_patch": 32, "tokens": 7}}


def batch_of(config, dtype=torch.float64):
    images = rng.uniform(rng.key(1), (4, 3, config.image, config.image)) * 2 - 1
    return images.to(dtype), torch.arange(4) % CLASSES


def moved(config, ops):
    """Parameters in float64, moved away from their initial values, at which several modules ignore their blocks."""
    params = model.init(config, 0, ops)
    return {
        n: p.double() + 0.1 * (rng.uniform(rng.named(rng.key(2), n), p.shape).double() - 0.5) for n, p in params.items()
    }


def run(config, arm="baseline", key=7, wrap=lambda loss: loss, of=None):
    """Loss and gradients; of: of another model with its parameters."""
    of, asked = of or config, parse(arm, MRT).ops
    ops = model.fit(asked, of)
    loss = wrap(objective(model.asked(of, ops), ops, lambda images, key: images, torch.float64))
    params = moved(config, model.fit(asked, config))
    value, aux, gradients = value_and_grad(loss, ops.frozen)(params, batch_of(config), rng.key(key))
    return value, aux, gradients


def distance(a, b):
    return max(((a[n] - b[n]).abs().max() / b[n].abs().max().clamp_min(1e-6)).item() for n in b)


def cosine(a, b):
    a, b = (torch.cat([tree[n].flatten() for n in b]) for tree in (a, b))
    return (a @ b / (a.norm() * b.norm())).item()
