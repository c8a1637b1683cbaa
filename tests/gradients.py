"""The loss and the gradients of a tiny model's training objective, and how they are compared."""

import pytest
import torch

from core import rng, vit
from core.step import objective, value_and_grad

CONFIG = vit.VitConfig(image=32, patch=8, width=16, depth=2, heads=2, mlp=32, classes=5)


def inputs(ops, config, dtype=torch.float64):
    """Parameters, those that the transform brings moved away from their initial values, and a batch."""
    key, brought = rng.key(2), ops.parameters(config)
    params = {n: p.to(dtype) for n, p in vit.init(config, 0, ops).items()}
    for n in brought:
        params[n] = params[n] + 0.1 * rng.uniform(rng.named(key, n), params[n].shape).to(dtype)
    images = (rng.uniform(rng.key(1), (6, 3, CONFIG.image, CONFIG.image)) * 2 - 1).to(dtype)
    return params, (images, torch.arange(6) % CONFIG.classes)


def loss_of(ops, config, dtype=torch.float64, **options):
    return objective(config, ops, lambda images, key: images, dtype, **options)


def run(ops, dtype=torch.float64, key=7, config=None):
    """(loss, gradients) of the training objective."""
    config = config or ops.config(CONFIG)
    gradient = value_and_grad(loss_of(ops, config, dtype), ops.frozen)
    value, _, gradients = gradient(*inputs(ops, config, dtype), rng.key(key))
    return value, gradients


def equal(a, b):
    return torch.equal(a[0], b[0]) and a[1].keys() == b[1].keys() and all(torch.equal(a[1][n], b[1][n]) for n in a[1])


def distance(a, b):
    """Largest difference of the gradients relative to the largest gradient of each parameter."""
    return max(((a[n] - b[n]).abs().max() / b[n].abs().max().clamp_min(1e-6)).item() for n in b)


def errors(draws, exact):
    """Of the mean of the draws the distance from the exact gradient, and of a draw the deviation from their mean: norms
    over all parameters, relative to the exact gradient's."""
    flat = torch.stack([torch.cat([g[n].flatten() for n in exact]) for g in draws])
    whole = torch.cat([g.flatten() for g in exact.values()])
    deviation = flat.var(0).sum().sqrt()
    return ((flat.mean(0) - whole).norm() / whole.norm()).item(), (deviation / whole.norm()).item()


def check_mean(draws, exact, rounding):
    """The mean over draws lies within four standard errors of the exact gradient."""
    for n in exact:
        samples = torch.stack([g[n].double() for g in draws])
        error = (samples.mean(0) - exact[n]).norm()
        expected = samples.var(0).sum().div(len(draws)).sqrt()
        assert error <= 4 * expected + rounding * exact[n].norm() + 1e-9, n


def check_by_finite_differences(ops, gradient):
    """The gradient belongs to the changed objective: central differences along random directions."""
    config = ops.config(CONFIG)
    params, batch = inputs(ops, config)
    loss, key, step = loss_of(ops, config), rng.key(7), 1e-6
    for seed in range(3):
        direction = {n: rng.uniform(rng.named(rng.key(seed), n), params[n].shape).double() - 0.5 for n in gradient}
        ahead, behind = (
            loss(params | {n: params[n] + sign * step * d for n, d in direction.items()}, batch, key)[0]
            for sign in (1, -1)
        )
        along = sum((gradient[n] * direction[n]).sum() for n in gradient)
        assert ((ahead - behind) / (2 * step)).item() == pytest.approx(along.item(), rel=1e-5)
