import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ablations.study.arms import parse
from core import engine, rng, vit
from core.data.augment import preparation
from core.data.splits import Split
from core.errors import InputError
from core.ops import EXACT
from core.step import AdamW, cast, make_step, memory, objective, start
from core.transforms.registry import REGISTRY

CPU = torch.device("cpu")
CONFIG = vit.VitConfig(16, 2, 16, 1, 2, 32, 5, dropout=0.1)
MRT = {"mrt": {"tokens": 16, "min_patch": 2, "max_patch": 4}}
ARMS = ("baseline", "decatt+flash", "mrt", "crs@0.3+flash", "recompute@True")


def keep(images, key):
    return images.to(torch.float32) / 255


def split(count=40):
    pixels = rng.words(rng.key(3), count * 3 * 16 * 16) & 255
    return Split(pixels.to(torch.uint8).reshape(count, 3, 16, 16), torch.arange(count) % 5)


def step_of(arm, how="eager", differentiator="autograd", steps=20):
    optimizer = AdamW(1e-2, schedule="cosine", steps=steps)
    prepare = preparation((0.4,) * 3, (0.3,) * 3, True, 1, 5.0)
    return engine.build(objective(CONFIG, parse(arm, MRT).ops, prepare), optimizer, how, differentiator)


def run(loop, norms, epochs=4):
    """Losses of every step, and the last state."""
    state, losses = start(vit.init(CONFIG, 0), rng.key(0)), []
    loop.warm_up(state)
    for rows in norms.values():
        rows.zero_()
    for epoch in range(epochs):
        order = rng.permutation(rng.key(epoch), 40)
        state, metrics = loop.epoch(state, order)
        losses += metrics.loss.tolist()
    return losses, state


@pytest.mark.parametrize("differentiator", ["autograd", "func"])
def test_compiled_equals_eager_for_20_steps(differentiator):
    """The real compiler, one block, flash and DeCAtt together."""
    losses = {}
    for how in ("eager", "compiled"):
        losses[how], _ = run(engine.Stepwise(step_of("decatt+flash", how, differentiator), split(), 8, CPU, {}), {})
    assert len(losses["eager"]) == 20
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-5)
    assert losses["eager"][-1] < losses["eager"][0]


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("per_replay", [1, 5])
def test_static_buffers_give_the_same_numbers(arm, per_replay):
    """What a CUDA graph would replay, run here as it is captured: the buffers carry state, order and position."""
    plain, last = run(engine.Stepwise(step_of(arm), split(), 8, CPU, {}), {})
    graphed = engine.Graphed(step_of(arm), split(), 8, CPU, {}, per_replay, capture=lambda body: body)
    for _ in range(2):  # a second seed uses the same buffers
        static, state = run(graphed, {})
        assert static == pytest.approx(plain, rel=1e-6)
        for mine, other in zip(tree_leaves(state), tree_leaves(last), strict=True):
            torch.testing.assert_close(mine, other)


def test_a_returned_state_survives_the_next_epoch():
    graphed = engine.Graphed(step_of("baseline"), split(), 8, CPU, {}, capture=lambda body: body)
    first, _ = graphed.epoch(start(vit.init(CONFIG, 0), rng.key(0)), torch.arange(40))
    kept = {name: p.clone() for name, p in first.params.items()}
    graphed.epoch(first, torch.arange(40))
    assert all(torch.equal(first.params[name], p) for name, p in kept.items())


def test_remembered_norms_are_the_same_in_both_loops():
    arm = parse("crs@0.3", {"crs": {"norms": "cached"}})
    step = engine.build(objective(CONFIG, arm.ops, keep), AdamW(1e-2), "eager")
    found = []
    for kind in (engine.Stepwise, lambda *a: engine.Graphed(*a, capture=lambda body: body)):
        norms = memory(CONFIG, 40, CPU)
        losses, _ = run(kind(step, split(), 8, CPU, norms), norms)
        found.append((losses, norms))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for name, rows in found[0][1].items():
        torch.testing.assert_close(rows, found[1][1][name])
        assert (rows > 0).any(1).all()  # every image was seen


def test_steps_a_replay_must_divide_the_epoch():
    with pytest.raises(InputError, match="3 steps a replay must divide the 5 of an epoch"):
        engine.Graphed(step_of("baseline"), split(), 8, CPU, {}, 3)


def test_a_second_epoch_and_a_second_seed_compile_nothing():
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    loss = objective(CONFIG, EXACT, keep)
    step = torch.compile(make_step(loss, AdamW(), "func"), fullgraph=True, backend=counting)
    loop = engine.Stepwise(step, split(), 8, CPU, {})
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            run(loop, {}, epochs=2)
    assert len(graphs) == 1


class HostWork(TorchDispatchMode):
    """Refuses what a CUDA graph cannot capture: a value read by the host, a tensor of the host's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}
        assert "cpu" not in devices, f"{func} takes or gives a tensor of the host"
        assert "local_scalar" not in func.__name__, f"{func} waits for the device"
        return out


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def on(device):
    """A state and a batch without data."""
    params = {name: torch.empty(shape, device=device) for name, shape in vit.shapes(CONFIG).items()}
    state = start(params, torch.empty(2, dtype=torch.int64, device=device))
    images = torch.empty(8, 3, 16, 16, dtype=torch.uint8, device=device)
    return state, (images, torch.empty(8, dtype=torch.int64, device=device))


@pytest.mark.parametrize("arm", ["baseline", "decatt+flash@tiled", "mrt", "mrt random", "crs@0.3", "recompute@True"])
def test_forward_pass_on_cuda_needs_no_host(arm, hopper):
    """Fake CUDA tensors: no GPU is needed to see a constant copied from the host."""
    prepare = preparation((0.4,) * 3, (0.3,) * 3, True, 1, 5.0)
    with FakeTensorMode():
        state, (images, _) = on("cuda")
        with HostWork():
            pixels = prepare(images, rng.fold_in(state.key, state.step))
            key = rng.split(state.key, 2)[1]
            params = cast(state.params, torch.bfloat16)
            name, *scorer = arm.split()
            settings = {"mrt": MRT["mrt"] | ({"scorer": scorer[0]} if scorer else {})}
            output = vit.forward(params, pixels, CONFIG, parse(name, settings).ops, key)
    assert output.logits.device.type == "cuda"


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "mrt"])
def test_whole_step_reads_nothing_back(arm):
    """Meta tensors have no values: whatever the host would read is an error."""
    prepare = preparation((0.4,) * 3, (0.3,) * 3, True, 1, 5.0)
    step = make_step(objective(CONFIG, parse(arm).ops, prepare, torch.bfloat16), AdamW(clip=1.0))
    with HostWork():
        state, metrics = step(*on("meta"))
    assert {t.device.type for t in tree_leaves((state, metrics[:-1]))} == {"meta"}


@pytest.mark.parametrize(
    ("name", "device", "work", "chosen", "why"),
    [
        ("auto", "cpu", 1e9, "eager", "would not repay compiling"),
        ("auto", "cpu", 1e18, "compiled", "1e\\+18 FLOPs a cell repay compiling"),
        ("auto", "cuda", 1e9, "graphed", "no host work"),
        ("compiled", "cpu", 1e9, "compiled", "as asked"),
    ],
)
def test_choice_of_engine(name, device, work, chosen, why):
    found, reason = engine.resolve(name, device, work)
    assert found == chosen
    assert re.search(why, reason)


def test_engines_that_are_not_to_be_had():
    with pytest.raises(InputError, match="unknown engine 'compile'; legal: auto, eager, compiled, graphed; did you"):
        engine.resolve("compile", "cpu")
    with pytest.raises(InputError, match="graphed.*needs --device cuda; pass --engine compiled or eager"):
        engine.resolve("graphed", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("arm", ["baseline", "decatt+flash@tiled", "crs@0.3", "mrt"])
@pytest.mark.parametrize("per_replay", [1, 5])
def test_graphed_equals_compiled_on_cuda(arm, per_replay):
    """In float32: the flash kernel takes bfloat16 alone and adds up its dQ in no fixed order."""
    device = torch.device("cuda")
    data = Split(*(t.to(device) for t in split()))
    prepare = preparation((0.4,) * 3, (0.3,) * 3, True, 1, 5.0)
    losses = []
    for how in ("compiled", "graphed"):
        step = engine.build(objective(CONFIG, parse(arm, MRT).ops, prepare), AdamW(1e-2), how)
        steps = (
            engine.Graphed(step, data, 8, device, {}, per_replay)
            if how == "graphed"
            else engine.Stepwise(step, data, 8, device, {})
        )
        state = start({n: p.to(device) for n, p in vit.init(CONFIG, 0).items()}, rng.key(0, device))
        steps.warm_up(state)
        orders = [rng.permutation(rng.key(epoch, device), 40) for epoch in range(4)]
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = [steps.epoch(state, order)[1].loss for order in orders]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        losses.append(torch.cat(out).tolist())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.gpu
def test_streamed_equals_resident_on_cuda():
    device = torch.device("cuda")
    losses = []
    for data in (split(), Split(*(t.to(device) for t in split()))):
        for kind in (engine.Stepwise, engine.Graphed):
            loop = kind(step_of("baseline", "compiled"), data, 8, device, {})
            state = start({n: p.to(device) for n, p in vit.init(CONFIG, 0).items()}, rng.key(0, device))
            losses.append(loop.epoch(state, rng.permutation(rng.key(1, device), 40))[1].loss.tolist())
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)


def test_registry_is_covered_here():
    assert {part.split("@")[0] for arm in ARMS for part in arm.split("+")} >= set(REGISTRY) - {"uniform"}
