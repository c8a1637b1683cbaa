"""The laws that every optimization obeys, at every setting that is used. Registering one puts it through all of them:

pytest tests/laws.py -k NAME

and those of a file of one's own: pytest tests/laws.py --plugin FILE.py
"""

import tempfile
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import CONFIG, check_by_finite_differences, check_mean, distance, equal, errors, inputs, loss_of, run

from core import plugins, rng, vit
from core.account.step import account
from core.errors import InputError
from core.layers import EXACT
from core.measure import peak_bytes
from core.ops import composed
from core.optimizers import AdamW
from core.step import Aux, make_step, objective, start, value_and_grad
from core.transforms.registry import REGISTRY, Transform

NO_REGION = {"int8", "budget"} if torch.__version__ < "2.14" else {}  # torch.func within one: --regions False
DRAWS = 100  # for the mean of an unbiased gradient


@dataclass(frozen=True)
class Case:
    """A transform with parameters."""

    name: str
    transform: Transform
    parameters: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return ",".join([self.name, *(f"{k}={v}" for k, v in self.parameters.items())])

    @property
    def rewrite(self):
        return self.transform.build(**self.parameters, **offline(self.parameters))

    @property
    def ops(self):
        return self.rewrite(EXACT)


def offline(parameters) -> dict[str, str]:
    """Weights for the scorer that would download them: the laws hold whatever the network has learned."""
    return {"weights": scorer_weights()} if parameters.get("scorer") == "features" else {}


@cache
def scorer_weights() -> str:
    from torchvision.models import shufflenet_v2_x0_5

    torch.manual_seed(0)
    path = Path(tempfile.mkdtemp()) / "shufflenet.pth"
    torch.save(shufflenet_v2_x0_5().state_dict(), path)
    return str(path)


def cases(registry: dict[str, Transform]):
    """Every transform with its defaults or at each of its levels, and at its further settings."""
    for name, t in registry.items():
        first = next(iter(t.build.__annotations__))
        yield from (Case(name, t, {first: level}) for level in t.levels) if t.levels else (Case(name, t),)
        yield from (Case(name, t, setting) for setting in t.settings)


CASES = [*cases(REGISTRY)]
TESTED = [case for case in CASES if case.name in plugins.of_files()] or CASES
each = pytest.mark.parametrize("case", TESTED, ids=str)


def unmodified(case):
    """The same of EXACT, for the model that the transform asks for; images are not resized for it."""
    return run(EXACT, config=replace(case.ops.config(CONFIG), image=CONFIG.image))


IDENTITIES = [(n, t) for n, t in REGISTRY.items() if t.identity is not None and n in {case.name for case in TESTED}]


@pytest.mark.parametrize(("name", "transform"), IDENTITIES, ids=[n for n, _ in IDENTITIES])
def test_identity(name, transform):
    """At its neutral parameters a transform changes nothing, bit for bit."""
    ops = transform.build(**transform.identity)(EXACT)
    for dtype in (torch.float64, torch.float32):
        assert equal(run(ops, dtype), run(EXACT, dtype))


@cache
def in_both_orders(first, second):
    """What comes of two cases, by their places, and the refusals. The same parts in the same order are one outcome."""
    outcomes, refusals = {}, []
    pair = CASES[first].rewrite, CASES[second].rewrite
    for one, two in (pair, pair[::-1]):
        try:
            ops = two(one(EXACT))
            outcomes[ops.parts] = outcomes.get(ops.parts) or run(ops)
        except InputError as refusal:
            refusals.append(str(refusal))
    return [*outcomes.values()], refusals


@each
def test_commutation_or_a_named_refusal(case):
    """With every other transform: the same numbers in either order, or both orders are refused by name."""
    for other in CASES:
        if other.name == case.name:
            continue
        outcomes, refusals = in_both_orders(*sorted((CASES.index(case), CASES.index(other))))
        for text in refusals:
            assert case.name in text
            assert other.name in text or "model of that patch" in text
        assert len(refusals) in (0, 2), str(other)
        assert refusals or equal(outcomes[0], outcomes[-1]), str(other)


@each
def test_wrappers_nest_either_way(case):
    """Which of two wrappers of one primitive is outside does not matter, unless one says that it is innermost."""
    mine = case.rewrite(EXACT)
    for other in CASES:
        theirs = other.rewrite(EXACT)
        try:
            parts = other.rewrite(mine).parts
        except InputError:
            continue
        shared = {w for part in mine.parts for w in part.wrap} & {w for part in theirs.parts for w in part.wrap}
        if other.name != case.name and shared and not any(part.innermost for part in parts):
            (value, gradient), (swapped, other_gradient) = (run(composed(EXACT, p)) for p in (parts, parts[::-1]))
            assert value.item() == pytest.approx(swapped.item(), rel=1e-12), str(other)
            assert distance(gradient, other_gradient) < 1e-9, str(other)


@each
def test_purity(case):
    """The same key gives the same bits on every call; no argument is written to."""
    ops = case.ops
    config = ops.config(CONFIG)
    params, batch = inputs(ops, config)
    copies = {n: p.clone() for n, p in params.items()}
    key, images = rng.key(3), batch[0].clone()
    gradient = value_and_grad(loss_of(ops, config))
    first, again = ((v, g) for v, _, g in (gradient(params, batch, key) for _ in range(2)))
    assert equal(first, again)
    assert all(torch.equal(params[n], copies[n]) for n in params)
    assert torch.equal(batch[0], images)
    assert torch.equal(key, rng.key(3))


@each
def test_evaluation_draws_nothing(case):
    """Without a key the result is the same on every call."""
    config = case.ops.config(CONFIG)
    params, (images, _) = inputs(case.ops, config)
    logits = [vit.forward(params, images, config, case.ops).logits for _ in range(2)]
    assert torch.equal(*logits)


@each
def test_contract(case):
    """What the transform declares, in float64."""
    contract = case.transform.contract
    (exact_loss, exact), (loss, gradient) = unmodified(case), run(case.ops)
    if contract in ("exact", "changes the update"):
        assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-12)
        assert distance(gradient, exact) < 1e-9
    elif contract == "unbiased gradient":
        assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-12)
        draws = [run(case.ops, key=k)[1] for k in range(DRAWS)]
        check_mean(draws, exact, 1e-9)
        assert any(distance(g, exact) > 1e-9 for g in draws), "declared unbiased, but nothing is estimated"
    elif contract == "biased gradient":
        assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-12)
        bias, deviation = errors([run(case.ops, key=k)[1] for k in range(8)], exact)
        print(f"{case}: bias {bias:.3g}, deviation {deviation:.3g} of the exact gradient")
        assert 1e-6 < bias < case.transform.bias
    else:
        assert contract == "changes the objective"
        assert abs(loss.item() - exact_loss.item()) > 1e-6, "declared to change the objective, but does not"
        check_by_finite_differences(case.ops, gradient)


@each
def test_a_step_changes_what_is_trained(case):
    """Parameters that the transform freezes keep their bits, the others move; the optimizer is the declared one."""
    ops = case.ops
    config = ops.config(CONFIG)
    params, batch = inputs(ops, config)
    state = start(params, AdamW(weight_decay=0.1), rng.key(7), ops)
    step = make_step(loss_of(ops, config), AdamW(weight_decay=0.1), ops)
    after, _ = step(state, batch)
    again, _ = step(state, batch)
    trained = [n for n in params if not ops.frozen(n)]
    assert trained
    for n, p in params.items():
        assert torch.equal(after.params[n], again.params[n])
        assert torch.equal(after.params[n], p) == (n not in trained), n
    if case.transform.contract == "changes the update":
        plain, _ = make_step(loss_of(ops, config), AdamW(weight_decay=0.1))(start(params, AdamW(), rng.key(7)), batch)
        assert any(not torch.equal(plain.params[n], after.params[n]) for n in params)


@each
def test_predicted_peak_is_the_measured_one(case):
    """Of a step, where activations outweigh the weights: the account sees all that a transform holds."""
    ops, size, side = case.ops, 32, CONFIG.image
    config = replace(ops.config(CONFIG), width=48, heads=3, mlp=192)
    step = make_step(objective(config, ops, lambda images, key: images.float() / 255), AdamW(), ops)
    batch = torch.zeros(size, 3, side, side, dtype=torch.uint8), torch.zeros(size, dtype=torch.int64)
    state = start(vit.init(config, 0, ops), AdamW(), rng.key(0), ops)
    step(state, batch)
    measured = peak_bytes(step, state, batch, device=torch.device("cpu"))
    scratch = 0.15 if case.parameters.get("scorer") == "features" else 0.02  # what a convolution takes inside
    assert account(config, ops, size, image=side).peak_bytes == pytest.approx(measured, rel=scratch)


@each
def test_works_under_torch_func(case):
    """torch.func gives autograd's value and gradients."""
    config = case.ops.config(CONFIG)
    loss = loss_of(case.ops, config)
    by_func, (other, _) = torch.func.grad_and_value(loss, has_aux=True)(*inputs(case.ops, config), rng.key(7))
    value, gradient = run(case.ops)
    assert value.item() == pytest.approx(other.item(), rel=1e-12)
    assert distance({n: by_func[n] for n in gradient}, gradient) < 1e-9


@each
def test_float32_is_near_float64(case):
    (exact_loss, exact), (loss, gradient) = run(case.ops), run(case.ops, torch.float32)
    assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-5)
    if case.transform.contract == "unbiased gradient":  # rows of nearly equal size are drawn in another order
        check_mean([run(case.ops, torch.float32, key=k)[1] for k in range(DRAWS // 3)], unmodified(case)[1], 1e-4)
    else:
        assert distance({n: g.double() for n, g in gradient.items()}, exact) < 1e-3


@each
def test_bfloat16(case):
    """The step in bf16: float32 master weights, loss and gradients; near the exact loss."""
    ops = case.ops
    config = ops.config(CONFIG)
    params, batch = inputs(ops, config, torch.float32)
    value, _, gradients = value_and_grad(loss_of(ops, config, torch.bfloat16))(params, batch, rng.key(7))
    assert value.item() == pytest.approx(run(ops)[0].item(), rel=3e-2)
    assert {g.dtype for g in gradients.values()} == {torch.float32}
    assert all(g.isfinite().all() for g in gradients.values())
    assert vit.forward(params, batch[0], config, ops, dtype=torch.bfloat16).logits.dtype == torch.bfloat16


@each
def test_one_graph(case):
    """The loss compiles without a break (fullgraph), its blocks as one region, and gives the eager numbers."""
    ops = case.ops
    config = ops.config(CONFIG)
    params, batch = inputs(ops, config)
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    torch._dynamo.reset()  # all cases share code objects, and torch keeps only a few results of each
    loss = loss_of(
        ops, config, region=(lambda fn: fn) if case.name in NO_REGION else torch.compiler.nested_compile_region
    )
    gradient = value_and_grad(torch.compile(loss, fullgraph=True, dynamic=False, backend=backend), ops.frozen)
    expected = run(ops)
    for _ in range(2):
        value, aux, gradients = gradient(params, batch, rng.key(7))
    assert len(graphs) == 1
    assert isinstance(aux, Aux)
    assert value.item() == pytest.approx(expected[0].item(), rel=1e-12)
    assert distance(gradients, expected[1]) < 1e-9
