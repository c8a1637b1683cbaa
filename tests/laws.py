"""The laws that every registered optimization obeys. Registering one puts it through all of them:

pytest tests/laws.py -k NAME
"""

import itertools
from dataclasses import replace
from functools import reduce

import pytest
import torch

from ablations.study.arms import Arm, parse
from core import rng, vit
from core.errors import InputError
from core.ops import EXACT
from core.step import Aux, cast, objective, value_and_grad
from core.transforms.registry import REGISTRY

CONFIG = vit.VitConfig(image=32, patch=8, width=16, depth=2, heads=2, mlp=32, classes=5)
DRAWS = 150  # for the mean of an unbiased gradient

# Every registered transform alone, with its defaults or at each of its levels.
NAMES = [f"{name}@{level}" if t.levels else name for name, t in REGISTRY.items() for level in t.levels or (None,)]
ARMS = [parse(name) for name in NAMES]
each = pytest.mark.parametrize("arm", ARMS, ids=NAMES)


def registered(arm: Arm):
    return REGISTRY[arm.name.partition("@")[0]]


def config_of(arm: Arm) -> vit.VitConfig:
    return replace(CONFIG, **arm.shape)


def inputs(config, dtype=torch.float64):
    params = {n: p.to(dtype) for n, p in vit.init(config, 0).items()}
    images = (rng.uniform(rng.key(1), (6, 3, CONFIG.image, CONFIG.image)) * 2 - 1).to(dtype)
    return params, (images, torch.arange(6) % CONFIG.classes)


def loss_of(ops, config, dtype=torch.float64):
    return objective(config, ops, lambda images, key: images, dtype)


def run(ops, config, dtype=torch.float64, key=7, differentiator="autograd"):
    """(loss, gradients) of the training objective."""
    gradient = value_and_grad(loss_of(ops, config, dtype), differentiator)
    value, _, gradients = gradient(*inputs(config, dtype), rng.key(key))
    return value, gradients


def equal(a, b):
    return torch.equal(a[0], b[0]) and all(torch.equal(a[1][n], b[1][n]) for n in a[1])


def distance(a, b):
    """Largest difference of the gradients relative to the largest gradient of each parameter."""
    return max(((a[n] - b[n]).abs().max() / b[n].abs().max().clamp_min(1e-6)).item() for n in b)


@pytest.mark.parametrize("name", [n for n, t in REGISTRY.items() if t.identity is not None])
def test_identity(name):
    """At its neutral parameters a transform changes nothing, bit for bit."""
    ops = REGISTRY[name].build(**REGISTRY[name].identity)(EXACT)
    for dtype in (torch.float64, torch.float32):
        assert equal(run(ops, CONFIG, dtype), run(EXACT, CONFIG, dtype))


PAIRS = [(a, b) for a, b in itertools.combinations(ARMS, 2) if registered(a) is not registered(b)]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=[f"{a.name}-{b.name}" for a, b in PAIRS])
def test_commutation_or_a_named_refusal(first, second):
    """Two transforms give the same arm in either order, or both orders are refused with a reason."""
    try:
        together = parse(f"{first.name}+{second.name}")
    except InputError as refusal:
        with pytest.raises(InputError) as other:
            parse(f"{second.name}+{first.name}")
        for message in (str(refusal), str(other.value)):
            for name in (first.name, second.name):
                assert name.partition("@")[0] in message
        return
    outcomes = [
        run(reduce(lambda ops, rewrite: rewrite(ops), order, EXACT), config_of(together))
        for order in (together.transforms, together.transforms[::-1])
    ]
    assert equal(*outcomes)


@each
def test_only_the_declared_field_changes(arm):
    changed = [f for f in EXACT.__dataclass_fields__ if getattr(arm.ops, f) is not getattr(EXACT, f)]
    assert changed == [registered(arm).field]


@each
def test_purity(arm):
    """The same key gives the same bits on every call; no argument is written to."""
    params, batch = inputs(config_of(arm))
    copies = {n: p.clone() for n, p in params.items()}
    key, images = rng.key(3), batch[0].clone()
    gradient = value_and_grad(loss_of(arm.ops, config_of(arm)))
    first, again = ((v, g) for v, _, g in (gradient(params, batch, key) for _ in range(2)))
    assert equal(first, again)
    assert all(torch.equal(params[n], copies[n]) for n in params)
    assert torch.equal(batch[0], images)
    assert torch.equal(key, rng.key(3))


@each
def test_evaluation_draws_nothing(arm):
    """Without a key the result is the same on every call."""
    params, (images, _) = inputs(config_of(arm))
    logits = [vit.forward(params, images, config_of(arm), arm.ops).logits for _ in range(2)]
    assert torch.equal(*logits)


@each
def test_contract(arm):
    """What the transform declares, in float64."""
    contract, config = registered(arm).contract, config_of(arm)
    (exact_loss, exact), (loss, gradient) = run(EXACT, config_without(arm)), run(arm.ops, config)
    if contract == "exact":
        assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-12)
        assert distance(gradient, exact) < 1e-9
    elif contract == "unbiased gradient":
        assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-12)
        draws = [run(arm.ops, config, key=k)[1] for k in range(DRAWS)]
        check_mean(draws, exact, 1e-9)
        assert any(distance(g, exact) > 1e-9 for g in draws), "declared unbiased, but nothing is estimated"
    else:
        assert abs(loss.item() - exact_loss.item()) > 1e-6, "declared to change the objective, but does not"
        check_by_finite_differences(arm, gradient)


def check_mean(draws, exact, rounding):
    """The mean over draws lies within four standard errors of the exact gradient."""
    for n in exact:
        samples = torch.stack([g[n].double() for g in draws])
        error = (samples.mean(0) - exact[n]).norm()
        expected = samples.var(0).sum().div(len(draws)).sqrt()
        assert error <= 4 * expected + rounding * exact[n].norm() + 1e-9, n


def config_without(arm):
    """The arm's config, for the unmodified model: images are not resized for it."""
    return replace(config_of(arm), image=CONFIG.image)


def check_by_finite_differences(arm, gradient):
    """The gradient belongs to the changed objective: central differences along random directions."""
    params, batch = inputs(config_of(arm))
    loss, key, step = loss_of(arm.ops, config_of(arm)), rng.key(7), 1e-6
    for seed in range(3):
        keys = rng.split(rng.key(100 + seed), len(params))
        direction = {n: rng.uniform(k, p.shape).double() - 0.5 for (n, p), k in zip(params.items(), keys, strict=True)}
        ahead, behind = (
            loss({n: p + sign * step * direction[n] for n, p in params.items()}, batch, key)[0] for sign in (1, -1)
        )
        along = sum((gradient[n] * direction[n]).sum() for n in params)
        assert ((ahead - behind) / (2 * step)).item() == pytest.approx(along.item(), rel=1e-5)


@each
def test_both_differentiators_agree(arm):
    config = config_of(arm)
    (value, gradient), (other, by_func) = run(arm.ops, config), run(arm.ops, config, differentiator="func")
    assert value.item() == pytest.approx(other.item(), rel=1e-12)
    assert distance(gradient, by_func) < 1e-9


@each
def test_float32_is_near_float64(arm):
    config = config_of(arm)
    (exact_loss, exact), (loss, gradient) = run(arm.ops, config), run(arm.ops, config, torch.float32)
    assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-5)
    if registered(arm).contract == "unbiased gradient":  # rows of nearly equal size are drawn in another order
        check_mean([run(arm.ops, config, torch.float32, key=k)[1] for k in range(DRAWS)], run(EXACT, config)[1], 1e-4)
    else:
        assert distance({n: g.double() for n, g in gradient.items()}, exact) < 1e-3


@each
def test_bfloat16(arm):
    """The step in bf16: float32 master weights, loss and gradients; near the exact loss."""
    config = config_of(arm)
    params, batch = inputs(config, torch.float32)
    value, _, gradients = value_and_grad(loss_of(arm.ops, config, torch.bfloat16))(params, batch, rng.key(7))
    assert value.item() == pytest.approx(run(arm.ops, config)[0].item(), rel=3e-2)
    assert {g.dtype for g in gradients.values()} == {torch.float32}
    assert all(g.isfinite().all() for g in gradients.values())
    low = cast(params, torch.bfloat16)
    assert vit.forward(low, batch[0].bfloat16(), config, arm.ops).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("differentiator", ["autograd", "func"])
@each
def test_one_graph(arm, differentiator):
    """Loss and gradient compile without a break (fullgraph), and give the eager numbers."""
    config = replace(config_of(arm), depth=1)
    params, batch = inputs(config, torch.float32)
    loss = loss_of(arm.ops, config, torch.float32)
    graphs = []

    def compiled(fn):
        def backend(graph, example):
            graphs.append(graph)
            return torch._dynamo.lookup_backend("aot_eager")(graph, example)

        return torch.compile(fn, fullgraph=True, dynamic=False, backend=backend)

    if differentiator == "func":
        gradient = compiled(value_and_grad(loss, "func"))
    else:
        gradient = value_and_grad(compiled(loss), "autograd")
    expected = value_and_grad(loss, differentiator)(params, batch, rng.key(7))
    for _ in range(2):
        value, aux, gradients = gradient(params, batch, rng.key(7))
    assert len(graphs) == 1
    assert isinstance(aux, Aux)
    assert value.item() == pytest.approx(expected[0].item(), rel=1e-6)
    assert distance(gradients, expected[2]) < 1e-4
