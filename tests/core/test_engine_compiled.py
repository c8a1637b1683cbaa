"""The compiled engine: one graph whose blocks are one region, with eager's numbers."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_leaves

from ablations.study.arms import parse
from core import engine, rng, vit
from core.data.splits import Split
from core.layers import EXACT
from core.optimizers import AdamW, Averaged
from core.step import start
from core.targets import Targets
from core.transforms.decatt import decatt

# torch 2.11's compiler takes the log-sum-exp of a fused attention in float64 for float32
FUSED = "decatt+flash" if torch.__version__ >= "2.14" else "decatt"
CONFIG = vit.VitConfig(image=16, patch=4, width=16, depth=3, heads=2, mlp=32, classes=5, dropout=0.1)


class Counting:
    """A cheap backend that keeps dynamo's graphs: autograd of the compiler, kernels of eager torch."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def regions(self):
        """The bodies that the graphs' regions call, one a call."""
        return [
            getattr(graph, node.args[0].target)
            for graph in self.graphs
            for node in graph.graph.nodes
            if node.target is torch.ops.higher_order.invoke_subgraph
        ]


def split(count=16):
    pixels = rng.words(rng.key(3), count * 3 * 16 * 16) & 255
    return Split(pixels.to(torch.uint8).reshape(count, 3, 16, 16), torch.arange(count) % 5)


def keep(images, key):
    return images.double() / 255


@pytest.fixture
def compiler(monkeypatch):
    backend = Counting()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    return backend


REGIONS = {
    "plain": parse("baseline").ops,
    "crs, decatt and flash": parse("crs@0.5+decatt+flash").ops,
    "decatt of two layers": decatt(3.0, layers=(0, -1))(EXACT),
    "recompute": parse("recompute@True").ops,
}


def two_steps(config, ops, how, **options):
    """Losses, penalties and the last state of two steps in float64."""
    optimizer = AdamW(1e-2)
    step = engine.build(config, ops, keep, torch.float64, optimizer, how, **options)
    params = {n: p.double() for n, p in vit.init(config, 0, ops).items()}
    state, measured = start(params, optimizer, rng.key(0), ops), []
    for batch in split().images.split(8):
        state, metrics = step(state, (batch, torch.arange(8) % 5))
        measured += [metrics.loss, metrics.penalty]
    return torch.stack(measured), state.optimizer.mean, state.optimizer.square, state.params


def assert_same(mine, other):
    # The gradient of the keys' bias is zero, and Adam turns its rounding errors into moves: compared by its moments.
    for a, b in zip(tree_leaves(mine[:3]), tree_leaves(other[:3]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for name, p in mine[3].items():
        tolerance = 1e-1 if name.endswith("qkv.bias") else 1e-8
        torch.testing.assert_close(p, other[3][name], rtol=1e-8, atol=tolerance)


@pytest.mark.parametrize("name", REGIONS)
def test_a_region_for_all_blocks_gives_the_numbers_of_eager(name, compiler):
    """And all blocks call one body; where a transform tells two kinds of blocks apart, one body each."""
    ops = REGIONS[name]
    assert_same(two_steps(CONFIG, ops, "compiled"), two_steps(CONFIG, ops, "eager"))
    bodies = compiler.regions()
    assert len(compiler.graphs) == 1  # the loss
    if len({ops.number(i, 3) for i in range(3)}) > 1:  # a body called once may be inlined
        assert len(bodies) in (2, 3)
        assert len(set(map(id, bodies))) == len(bodies) - 1
    else:
        assert len(bodies) == 3
        assert len(set(map(id, bodies))) == 1


@pytest.mark.parametrize(("depth", "options"), [(2, {}), (3, {"regions": False})], ids=["two blocks", "as asked"])
def test_without_a_region_the_numbers_are_the_same(depth, options, compiler):
    """A region costs more to compile than a second block."""
    config = replace(CONFIG, depth=depth)
    assert_same(two_steps(config, EXACT, "compiled", **options), two_steps(config, EXACT, "eager"))
    assert len(compiler.graphs) == 1
    assert compiler.regions() == []


def trained(arm, how, depth):
    """Metrics [20 steps, 5] of two seeds in turn, two epochs each; all in float64, as steps magnify roundings."""
    config, ops, targets = replace(CONFIG, depth=depth), parse(arm).ops, Targets(smoothing=0.1)
    optimizer = Averaged(AdamW(1e-2, schedule="cosine", steps=10), 0.9, warmup=True)
    step = engine.build(
        config, ops, lambda images, _: images.double() / 255, torch.float64, optimizer, how, targets=targets
    )
    loop, found = engine.Stepwise(step, split(40), 8, torch.device("cpu")), []
    for seed in range(2):
        params = {name: p.double() for name, p in vit.init(config, seed, ops).items()}
        state = start(params, optimizer, rng.key(seed), ops)
        for epoch in range(2):
            state, metrics = loop.epoch(state, rng.permutation(rng.key(epoch), 40))
            found.append(torch.stack([values.double() for values in metrics], dim=1))
    return torch.cat(found)


def test_a_second_epoch_and_a_second_seed_compile_nothing(compiler):
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert len(trained("baseline", "compiled", depth=1)) == 20
    assert len(compiler.graphs) == 1  # the loss


@pytest.mark.parametrize("arm", ["baseline", FUSED])
def test_regions_under_the_real_compiler_give_the_metrics_of_eager(arm):
    """Value and parts too, where the gradient alone would not tell: three blocks, dropout on, float64."""
    ops = parse(arm).ops
    config = replace(CONFIG, patch=8)
    params = {n: p.double() for n, p in vit.init(config, 0, ops).items()}
    batch = rng.uniform(rng.key(1), (6, 3, 16, 16)).double(), torch.arange(6) % 5
    results = []
    for how in ("eager", "compiled"):
        step = engine.build(config, ops, lambda images, key: images, torch.float64, AdamW(), how)
        results.append(step(start(params, AdamW(), rng.key(0), ops), batch))
    (expected, metrics), (state, compiled) = results
    for name, value in metrics._asdict().items():
        assert getattr(compiled, name).item() == pytest.approx(value.item(), rel=1e-12), name
    assert all((state.params[n] - p).abs().max() < 1e-9 for n, p in expected.params.items())


def test_compiled_equals_eager_for_20_steps():
    """The real compiler: three blocks in a region, flash and DeCAtt together; every metric, where the gradient alone
    would not tell."""
    eager, compiled = (trained(FUSED, how, depth=3) for how in ("eager", "compiled"))
    torch.testing.assert_close(compiled, eager, rtol=1e-8, atol=1e-10)
    assert eager[9, 0] < eager[0, 0]
