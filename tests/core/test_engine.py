"""How a step runs: loops over data, buffers that a graph replays, and what a device must not be asked."""

import re
from dataclasses import replace
from functools import partial

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
from core.layers import EXACT
from core.model import shapes
from core.optimizers import AdamW, Averaged, Clipped
from core.step import make_step, objective, start
from core.targets import Targets
from core.transforms.registry import REGISTRY

CPU = torch.device("cpu")
CONFIG = vit.VitConfig(16, 2, 16, 1, 2, 32, 5, dropout=0.1)
MRT = {"mrt": {"tokens": 16, "min_patch": 2, "max_patch": 4}}
PREPARE = preparation((0.4,) * 3, (0.3,) * 3, True, 1, 5.0, crop=0.3)
TARGETS, OPTIMIZER = Targets(0.4, 0.1), Averaged(AdamW(1e-2), 0.9, warmup=True)
MORE = "droppath+flash@tiled+layerscale+lora+muon+patchdrop+qknorm+readout+registers+tome"
ARMS = ("baseline", "decatt+flash", "mrt", "crs@0.3+flash", "recompute@True", MORE, "int8", "lowbp", "dropit", "budget")


def split(count=40):
    pixels = rng.words(rng.key(3), count * 3 * 16 * 16) & 255
    return Split(pixels.to(torch.uint8).reshape(count, 3, 16, 16), torch.arange(count) % 5)


def step_of(arm, how="eager", steps=20):
    optimizer = replace(OPTIMIZER, inner=AdamW(1e-2, schedule="cosine", steps=steps))
    return engine.build(CONFIG, parse(arm, MRT).ops, PREPARE, torch.float32, optimizer, how, targets=TARGETS)


def run(loop, epochs=4, ops=EXACT):
    """Losses of every step, and the last state."""
    state, losses = start(vit.init(CONFIG, 0, ops), OPTIMIZER, rng.key(0), ops), []
    loop.warm_up(state)
    for epoch in range(epochs):
        order = rng.permutation(rng.key(epoch), 40)
        state, metrics = loop.epoch(state, order)
        losses += metrics.loss.tolist()
    return losses, state


@pytest.mark.parametrize("arm", ARMS)
def test_static_buffers_give_the_same_numbers(arm):
    """What a CUDA graph would replay, run here as it is captured: the buffers carry state, order and position."""
    ops = parse(arm, MRT).ops
    plain, last = run(engine.Stepwise(step_of(arm), split(), 8, CPU), ops=ops)
    graphed = engine.Graphed(step_of(arm), split(), 8, CPU, capture=lambda body: body)
    for _ in range(2):  # a second seed uses the same buffers
        static, state = run(graphed, ops=ops)
        assert static == pytest.approx(plain, rel=1e-6)
        for mine, other in zip(tree_leaves(state), tree_leaves(last), strict=True):
            torch.testing.assert_close(mine, other)


def test_a_returned_state_survives_the_next_epoch():
    graphed = engine.Graphed(step_of("baseline"), split(), 8, CPU, capture=lambda body: body)
    first, _ = graphed.epoch(start(vit.init(CONFIG, 0), OPTIMIZER, rng.key(0)), torch.arange(40))
    kept = {name: p.clone() for name, p in first.params.items()}
    graphed.epoch(first, torch.arange(40))
    assert all(torch.equal(first.params[name], p) for name, p in kept.items())


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


def on(device, ops):
    """A state and a batch without data."""
    params = {name: torch.empty(shape, device=device) for name, shape in shapes(CONFIG, ops).items()}
    state = start(params, OPTIMIZER, torch.empty(2, dtype=torch.int64, device=device), ops)
    images = torch.empty(8, 3, 16, 16, dtype=torch.uint8, device=device)
    return state, (images, torch.empty(8, dtype=torch.int64, device=device))


@pytest.mark.parametrize(
    "arm", ["baseline", "decatt+flash@tiled", "mrt", "mrt random", "crs@0.3", "recompute@True", MORE]
)
def test_forward_pass_on_cuda_needs_no_host(arm, hopper):
    """Fake CUDA tensors: no GPU is needed to see a constant copied from the host."""
    name, *scorer = arm.split()
    ops = parse(name, {"mrt": MRT["mrt"] | ({"scorer": scorer[0]} if scorer else {})}).ops
    with FakeTensorMode():
        state, (images, _) = on("cuda", ops)
        with HostWork():
            pixels = PREPARE(images, rng.fold_in(state.key, state.step))
            key = rng.named(state.key, "model")
            output = vit.forward(state.params, pixels, CONFIG, ops, key, torch.bfloat16)
    assert output.logits.device.type == "cuda"


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "mrt"])
def test_whole_step_reads_nothing_back(arm):
    """Meta tensors have no values: whatever the host would read is an error."""
    ops = parse(arm).ops
    optimizer = replace(OPTIMIZER, inner=Clipped(AdamW(), 1.0))
    step = make_step(objective(CONFIG, ops, PREPARE, torch.bfloat16, targets=TARGETS), optimizer, ops)
    with HostWork():
        state, metrics = step(*on("meta", ops))
    assert {t.device.type for t in tree_leaves((state, metrics))} == {"meta"}


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


@pytest.mark.parametrize("name", ["TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"])
def test_eager_is_not_told_as_compiled(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    for asked, device, work in (("compiled", "cpu", 0), ("auto", "cpu", 1e18), ("auto", "cuda", 0)):
        with pytest.raises(InputError, match=f"needs torch.compile, which {name}=1 turns off; unset it, or pass eager"):
            engine.resolve(asked, device, work)
    assert engine.resolve("auto", "cpu", 0)[0] == "eager"


@pytest.mark.gpu
@pytest.mark.parametrize("arm", ["baseline", "decatt+flash@tiled", "crs@0.3", "mrt"])
@pytest.mark.parametrize("depth", [1, 3])
def test_graphed_equals_compiled_on_cuda(arm, depth):
    """One block, and three in a region; in float32, for the flash kernel takes bfloat16 alone and adds up its dQ in no
    fixed order."""
    device, config = torch.device("cuda"), replace(CONFIG, depth=depth)
    data = Split(*(t.to(device) for t in split()))
    losses = []
    for how in ("compiled", "graphed"):
        step = engine.build(config, parse(arm, MRT).ops, PREPARE, torch.float32, OPTIMIZER, how, targets=TARGETS)
        steps = engine.loop(how, step, data, 8, device)
        state = start(vit.init(config, 0, device=device), OPTIMIZER, rng.key(0, device))
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
            loop = kind(step_of("baseline", "compiled"), data, 8, device)
            state = start(vit.init(CONFIG, 0, device=device), OPTIMIZER, rng.key(0, device))
            losses.append(loop.epoch(state, rng.permutation(rng.key(1, device), 40))[1].loss.tolist())
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)


def test_registry_is_covered_here():
    assert {part.split("@")[0] for arm in ARMS for part in arm.split("+")} >= set(REGISTRY) - {"uniform"}


def test_a_graph_keeps_what_an_optimizer_keeps_of_the_old_state(batch, config):
    """One that remembers the parameters of the step before: the new state holds the old one's tensors."""

    class Heavy:
        def init(self, params):
            return params

        def update(self, params, gradients, state, step):
            return {n: p - 0.1 * gradients[n] + 0.5 * (p - state[n]) for n, p in params.items()}, params

        def rate(self, step):
            return step.double() * 0 + 0.1

    images, labels = torch.cat([batch[0]] * 4), torch.cat([batch[1]] * 4)
    split, cpu, params = Split(images, labels), torch.device("cpu"), vit.init(config, 0)
    losses = []
    for loop in (engine.Stepwise, partial(engine.Graphed, capture=lambda body: body)):
        step = make_step(objective(config, EXACT, lambda x, key: x), Heavy())
        made = loop(step, split, 6, cpu)
        _, metrics = made.epoch(start(params, Heavy(), rng.key(0)), torch.arange(24))
        losses.append(metrics.loss.double())
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
