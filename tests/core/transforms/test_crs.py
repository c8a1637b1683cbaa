import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from core import rng, vit
from core.errors import InputError
from core.layers import EXACT
from core.ops import Site
from core.transforms.crs import ESTIMATORS, _norms, crs, sample, sampled_linear, sampled_product
from core.transforms.flash import flash

DRAWS = 4000
HEAVY = torch.arange(1, 25).double().pow(-2) * 7
SIZES = {
    "zero rows": torch.tensor([0, 3, 0, 1, 2, 0, 1, 5], dtype=torch.float64),
    "one dominant": torch.tensor([1, 1e3, 2, 1, 0.5, 1, 1, 2], dtype=torch.float64),
    "all equal": torch.full((8,), 0.3, dtype=torch.float64),
    "heavy tail": HEAVY,
    "tiny tail": torch.cat((torch.ones(3), torch.full((5,), 1e-6))).double(),
}


def totals(p, k, estimator, draws=DRAWS):
    """Each row's total weight in many independent draws [draws, n]."""
    index, weight = sample(p.expand(draws, -1), k, rng.key(5), estimator)
    assert index.shape == weight.shape == (draws, k)
    return torch.zeros(draws, len(p), dtype=torch.float64).scatter_add(1, index, weight.double())


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("k", [1, 3, 5, 8])
@pytest.mark.parametrize("name", SIZES)
def test_every_row_weighs_one_in_expectation(name, k, estimator):
    p = SIZES[name]
    if k < 4 or estimator == "plain":
        p = torch.where(p > 0, p.clamp_min(p.max() / 50), p)  # rarer draws would be too rare to be seen in the mean
    total = totals(p, k, estimator)
    drawn = p > 0
    error = (total.mean(0) - 1).abs()[drawn]
    assert (error <= 4 * total.std(0)[drawn] / DRAWS**0.5 + 1e-6).all()
    assert (total[:, ~drawn] == 0).all()


@pytest.mark.parametrize("estimator", ["wta", "systematic"])
def test_k_of_n_and_enough_for_the_nonzero_rows_are_exact(estimator):
    for p, k in ((HEAVY, len(HEAVY)), (SIZES["zero rows"], 5), (SIZES["all equal"], 8)):
        assert torch.allclose(totals(p, k, estimator, 50), (p > 0).double().expand(50, -1), atol=1e-6)


def test_no_row_has_a_size():
    index, weight = sample(torch.zeros(6), 3, rng.key(0))
    assert weight.tolist() == [0, 0, 0]
    assert ((index >= 0) & (index < 6)).all()


def brute_force_winners(p, k):
    """argmin over 0 <= c < k of (1 - P_c)² / (k - c), one c at a time."""
    ordered = sorted((p / p.sum()).tolist(), reverse=True)
    return min(range(k), key=lambda c: (sum(ordered[c:]) ** 2 / (k - c), c))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=30), st.data())
def test_winners_minimise_the_bound(sizes, data):
    p = torch.tensor(sizes, dtype=torch.float64)
    k = data.draw(st.integers(1, len(sizes)))
    winners = brute_force_winners(p, k)
    index, weight = sample(p, k, rng.key(3), "wta")
    assert (weight[:winners] == 1).all()
    assert sorted(p[index[:winners]].tolist(), reverse=True) == sorted(sizes, reverse=True)[:winners]
    rest = p.sum() - p[index[:winners]].sum()
    assert torch.allclose(weight[winners:], rest / ((k - winners) * p[index[winners:]]), rtol=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=30), st.data())
def test_systematic_draws_no_row_twice_and_caps_inclusion(sizes, data):
    k = data.draw(st.integers(1, len(sizes)))
    index, weight = sample(torch.tensor(sizes, dtype=torch.float64), k, rng.key(4), "systematic")
    assert len(set(index.tolist())) == k
    assert (weight >= 1 - 1e-6).all()


def relative_error(p, k, estimator):
    """Mean squared error of the estimate of sum_i g_i x_i^T for rows of norm p, over that sum squared."""
    normal = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(len(p), 6, dtype=torch.float64, generator=normal), dim=-1) * p[:, None]
    g = torch.randn(len(p), 4, dtype=torch.float64, generator=normal)
    estimate = torch.einsum("tn,no,ni->toi", totals(p, k, estimator, 2000), g, x)
    exact = g.T @ x
    return ((estimate - exact).square().sum((1, 2)).mean() / exact.square().sum()).item()


def test_errors_are_ordered_as_measured_elsewhere():
    """Heavy tails at k/n = 0.1: plain above winner-take-all above systematic; flat rows: the last is best."""
    heavy = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).pow(-1.5)
    plain, wta, systematic = (relative_error(heavy, 20, e) for e in ("plain", "wta", "systematic"))
    assert plain > 2 * wta
    assert wta > systematic
    flat = torch.ones(200, dtype=torch.float64)
    assert relative_error(flat, 60, "systematic") < relative_error(flat, 60, "plain")


CONFIG = vit.VitConfig(16, 4, 16, 2, 2, 32, 5)


def linear(ops, x, w, b, key, name="mlp.fc1"):
    """The linear map of these weights by `ops`, where the model calls it under this name."""
    site = Site(name, {f"{name}.weight": w, f"{name}.bias": b}, CONFIG, ops, key, x.dtype, {})
    return ops.linear(site, lambda x: x, x)


def attend(ops, q, k, v, key):
    return ops.attend(Site("attn", {}, CONFIG, ops, key, q.dtype, {}), q, k, v)


@pytest.fixture
def layer():
    torch.manual_seed(1)
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 9, 6), (5, 6), (5,)))
    return x, w, b, torch.randn(4, 9, 5, dtype=torch.float64)


def gradients(y, G, *inputs):
    return torch.autograd.grad(y, inputs, G)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_linear_forward_and_input_and_bias_gradients_are_exact_bit_for_bit(layer, estimator, dtype):
    x, w, b, G = (t.detach().to(dtype).requires_grad_() for t in layer)
    y, exact = linear(crs(0.3, estimator=estimator)(EXACT), x, w, b, rng.key(0)), F.linear(x, w, b)
    (dx, dw, db), (ex, ew, eb) = gradients(y, G, x, w, b), gradients(exact, G, x, w, b)
    assert torch.equal(y, exact)
    assert torch.equal(dx, ex)
    assert torch.equal(db, eb)
    assert not torch.allclose(dw, ew, rtol=1e-3)


@pytest.mark.parametrize("keep_cls", [True, False])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_linear_weight_gradient_is_unbiased(layer, estimator, keep_cls):
    x, w, b, G = layer
    ops = crs(0.3, estimator=estimator, keep_cls=keep_cls)(EXACT)
    draws = torch.stack([gradients(linear(ops, x, w, b, rng.key(i)), G, w)[0] for i in range(1500)])
    exact = gradients(F.linear(x, w, b), G, w)[0]
    standard = (draws.var(0).sum() / len(draws)).sqrt()
    assert (draws.mean(0) - exact).norm() < 4 * standard


def test_rows_with_the_only_gradient_are_kept(layer):
    """As in the last block under class-token pooling: exact with keep_cls, far off without."""
    x, w, b, G = layer
    G = torch.cat((G[:, :1], torch.zeros_like(G[:, 1:])), 1)
    exact = gradients(F.linear(x, w, b), G, w)[0]
    kept = gradients(linear(crs(0.3)(EXACT), x, w, b, rng.key(0)), G, w)[0]
    assert torch.allclose(kept, exact, rtol=1e-12)
    missed = gradients(linear(crs(0.3, keep_cls=False)(EXACT), x, w, b, rng.key(0)), G, w)[0]
    assert (missed - exact).norm() > 0.1 * exact.norm()


def test_more_class_rows_than_k_are_all_kept(layer):
    x, w, b, G = layer
    G = torch.cat((G[:, :1], torch.zeros_like(G[:, 1:])), 1)
    tiny = gradients(linear(crs(0.01)(EXACT), x, w, b, rng.key(0)), G, w)[0]
    assert torch.allclose(tiny, gradients(F.linear(x, w, b), G, w)[0], rtol=1e-12)


@pytest.mark.parametrize("keep_cls", [True, False])
def test_product_gradients_are_unbiased_and_independent(keep_cls):
    torch.manual_seed(2)
    a, b, G = (torch.randn(s, dtype=torch.float64) for s in ((2, 3, 7, 5), (2, 3, 5, 6), (2, 3, 7, 6)))
    a, b = a.requires_grad_(), b.requires_grad_()

    def product(a, b, key):
        return sampled_product(a, b, 0.5, key, sample, keep_cls)

    assert torch.equal(product(a, b, rng.key(0)), a @ b)
    draws = [gradients(product(a, b, rng.key(i)), G, a, b) for i in range(1500)]
    for mine, exact in zip(map(torch.stack, zip(*draws, strict=True)), gradients(a @ b, G, a, b), strict=True):
        standard = (mine.var(0).sum() / len(mine)).sqrt()
        assert (mine.mean(0) - exact).norm() < 4 * standard
    da, db = (torch.stack(d)[:, 0, 0].flatten(1) for d in zip(*draws, strict=True))
    correlation = torch.corrcoef(torch.stack((da[:, 3], db[:, 3])))[0, 1]
    assert abs(correlation) < 4 / len(da) ** 0.5


def test_sampled_attention_is_unbiased_for_queries_keys_and_values():
    """The two products must draw apart: the gradient of the first goes through the second's."""
    torch.manual_seed(4)
    q, k, v = (torch.randn(1, 2, 8, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    G = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    ops = crs(0.4, "published", keep_cls=False)(EXACT)
    draws = [gradients(attend(ops, q, k, v, rng.key(i)), G, q, k, v) for i in range(1200)]
    for mine, exact in zip(
        map(torch.stack, zip(*draws, strict=True)),
        gradients(attend(EXACT, q, k, v, None), G, q, k, v),
        strict=True,
    ):
        standard = (mine.var(0).sum() / len(mine)).sqrt()
        assert (mine.mean(0) - exact).norm() < 4 * standard


def test_low_precision_rounds_rows_and_not_their_weights():
    """A weight rounded to bfloat16 (3.33 -> 3.328) would be a bias; norms of bfloat16 rows are float32."""
    x = torch.ones(1000, 4, dtype=torch.bfloat16)
    weight, bias = torch.ones(2, 4, dtype=torch.bfloat16).requires_grad_(), torch.zeros(2, dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(crs(0.301, estimator="plain")(EXACT), x * 1.0078125, weight, bias, rng.key(0))
    rows = next(t for t in kept if t.shape == (301, 4))
    exact = torch.tensor(1000 / 301 * 1.0078125).to(torch.bfloat16)
    assert torch.equal(rows, exact.expand(301, 4))
    assert _norms(x, -1).dtype == torch.float32


def test_scopes(layer):
    """maps leaves proj exact under fused attention, and published samples qkv alone."""
    x, w, b, G = layer
    exact = gradients(F.linear(x, w, b), G, w)[0]

    def sampled(ops, name):
        return not torch.equal(gradients(linear(ops, x, w, b, rng.key(0), name), G, w)[0], exact)

    names = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert [sampled(crs(0.3)(EXACT), n) for n in names] == [True] * 4
    for ops in (flash()(crs(0.3)(EXACT)), crs(0.3)(flash()(EXACT))):
        assert [sampled(ops, n) for n in names] == [True, False, True, True]
    assert [sampled(crs(0.3, "published")(EXACT), n) for n in names] == [True, False, False, False]


def test_no_key_is_exact_and_ratio_one_is_the_identity(layer):
    x, w, b, _ = layer
    assert crs(1)(EXACT) == EXACT
    assert linear(crs(0.3)(EXACT), x, w, b, None).grad_fn.name() == F.linear(x, w, b).grad_fn.name()


def test_same_key_same_draw_and_another_key_another():
    p = torch.rand(50, generator=torch.Generator().manual_seed(0))
    first, again, other = (sample(p, 10, rng.key(k))[0] for k in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_compiled_draws_are_the_eager_ones(estimator):
    p = torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(lambda p, key: sample(p, 9, key, estimator), fullgraph=True, backend="aot_eager")
    for mine, eager in zip(compiled(p, rng.key(1)), sample(p, 9, rng.key(1), estimator), strict=True):
        assert torch.allclose(mine.double(), eager.double(), rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0.0}, r"ratio 0.0 is outside \(0, 1\]"),
        ({"ratio": 1.5}, "ratio 1.5 is outside"),
        ({"ratio": float("nan")}, "ratio nan is outside"),
        ({"ratio": 0.5, "scope": "all"}, "unknown crs scope 'all'; legal: maps, published"),
        ({"ratio": 0.5, "estimator": "top"}, "unknown crs estimator 'top'; legal: wta, systematic, plain"),
    ],
)
def test_bad_parameters(arguments, message):
    with pytest.raises(InputError, match=message):
        crs(**arguments)


def test_products_under_flash_are_refused_in_either_order():
    published = crs(0.3, scope="published")
    for first, second in ((published, flash()), (flash(), published)):
        with pytest.raises(InputError, match="crs and flash both replace the model's attend; choose one"):
            second(first(EXACT))
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k {k} is outside 1 to 5"):
            sample(torch.ones(5), k, rng.key(0))


def test_low_precision_inputs_give_gradients_in_their_type(layer):
    x, w, b, G = (t.detach().bfloat16().requires_grad_() for t in layer)
    y = sampled_linear(x, w, b, 0.3, rng.key(0), sample)
    assert [g.dtype for g in gradients(y, G, x, w, b)] == [torch.bfloat16] * 3
    y = sampled_product(x, x.mT, 0.3, rng.key(0), sample)
    assert y.dtype == torch.bfloat16
