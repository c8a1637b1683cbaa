import pytest
import torch

from core import engine, rng, vit
from core.errors import InputError
from core.ops import EXACT
from core.step import AdamW, objective, start
from core.transforms import REGISTRY


def keep(images, key):
    return images


def losses(how, differentiator, config, ops, batch, steps):
    step = engine.build(objective(config, ops, keep), AdamW(1e-2), how, differentiator)
    state, out = start(vit.init(config, 0), rng.key(0)), []
    for _ in range(steps):
        state, metrics = step(state, batch)
        out.append(metrics.loss.item())
    return out


@pytest.mark.parametrize("differentiator", ["autograd", "func"])
def test_compiled_equals_eager_for_20_steps(batch, differentiator):
    """The real compiler, one block, flash and DeCAtt together."""
    config = vit.VitConfig(16, 4, 16, 1, 2, 32, 5)
    ops = REGISTRY["flash"].build()(REGISTRY["decatt"].build()(EXACT))
    eager = losses("eager", differentiator, config, ops, batch, 20)
    assert losses("compiled", differentiator, config, ops, batch, 20) == pytest.approx(eager, rel=1e-5)
    assert eager[-1] < eager[0]


def test_a_second_call_compiles_nothing(config, batch):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    loss = objective(config, EXACT, keep)
    step = torch.compile(engine.build(loss, AdamW(), "eager", "func"), fullgraph=True, backend=counting)
    state = start(vit.init(config, 0), rng.key(0))
    for _ in range(3):
        state, _ = step(state, batch)
    assert len(graphs) == 1


def test_choice_of_engine():
    assert engine.resolve("auto", "cpu") == "eager"
    assert engine.resolve("auto", "cuda") == "compiled"
    assert engine.resolve("compiled", "cpu") == "compiled"
    with pytest.raises(InputError, match="unknown engine 'compile'; legal: auto, eager, compiled, graphed; did you"):
        engine.resolve("compile", "cpu")
    with pytest.raises(InputError, match="graphed"):
        engine.resolve("graphed", "cpu")
