"""Modules of others compiled."""

import pytest
import torch
from foreign import MRT, batch_of, distance, moved, run

from ablations.study.arms import parse
from core import engine, model, rng
from core.optimizers import AdamW
from core.step import start

CASES = [
    (arm, name)
    for arm in ("baseline", "crs@0.5+decatt+flash", "recompute", "droppath", "readout")
    for name in ("timm:vit_tiny_patch16_224", "hf:vit", "hand_written")
    if (arm, name) != ("readout", "hand_written")  # which has no class token
]


@pytest.mark.parametrize(("arm", "name"), CASES)
def test_one_graph(load, name, arm):
    """Compiled without a break, with the eager numbers."""
    config, graphs = load(name), []

    def backend(graph, example):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    torch._dynamo.reset()
    value, _, gradients = run(
        config, arm, wrap=lambda loss: torch.compile(loss, fullgraph=True, dynamic=False, backend=backend)
    )
    expected, _, exact = run(config, arm)
    assert len(graphs) == 1
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert distance(gradients, exact) < 1e-9


@pytest.mark.parametrize("arm", ["baseline", "mrt+readout+droppath"])
def test_compiled_steps_are_the_eager_ones(load, arm):
    """In float32: torch 2.11 miscompiles fused attention in float64 on a CPU."""
    config, losses = load("timm:vit_tiny_patch16_224", 64), {}
    ops, batch = model.fit(parse(arm, MRT).ops, config), batch_of(config, torch.float32)
    for how in ("eager", "compiled"):
        torch._dynamo.reset()
        step = engine.build(config, ops, lambda images, key: images, torch.float32, AdamW(1e-2), how)
        state = start({n: p.float() for n, p in moved(config, ops).items()}, AdamW(1e-2), rng.key(3), ops)
        losses[how] = []
        for _ in range(3):
            state, metrics = step(state, batch)
            losses[how].append(metrics.loss.item())
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-4)
    assert losses["eager"][2] < 0.99 * losses["eager"][0]
