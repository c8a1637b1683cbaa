import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core import rng, vit
from core.errors import InputError
from core.layers import EXACT
from core.ops import Site, rewrite
from core.transforms.decatt import decatt, decorrelation
from core.transforms.flash import flash

NORMS = ["per_head", "frobenius"]


def heads(B=3, h=4, N=7, d=5, dtype=torch.float64, seed=0):
    return rng.uniform(rng.key(seed), (B, h, N, d)).to(dtype) * 2 - 1


def penalty(transform, layers):
    """The penalties of a model's blocks with these heads, summed."""
    ops, config = transform(EXACT), vit.VitConfig(16, 4, 16, len(layers), 2, 32, 5)
    site = Site("attn", {}, config, ops, None, torch.float64, {})
    return sum(ops.penalty(site._replace(block=ops.number(i, len(layers))), A) for i, A in enumerate(layers))


def by_loops(A, norm):
    """The definition, a pair of heads at a time."""
    A = A.flatten(2).double()
    total = 0.0
    for i in range(A.shape[1]):
        for j in range(A.shape[1]):
            if i != j:
                dots = (A[:, i] * A[:, j]).sum(-1)
                size = A[:, i].norm(dim=-1) * A[:, j].norm(dim=-1) if norm == "per_head" else A.square().sum((1, 2))
                total += (dots / size).square().mean().item()
    return total


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
@pytest.mark.parametrize("norm", NORMS)
def test_equals_the_definition(norm, B, h, N, d, seed):
    A = heads(B, h, N, d, seed=seed)
    assert decorrelation(A, norm).item() == pytest.approx(by_loops(A, norm), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_orthogonal_heads_cost_nothing(norm):
    A = torch.eye(4).reshape(1, 4, 2, 2).repeat(3, 1, 1, 1)
    assert decorrelation(A, norm).item() == 0


@pytest.mark.parametrize(("norm", "expected"), [("per_head", 4 * 3), ("frobenius", 3 / 4)])
def test_identical_heads(norm, expected):
    A = heads(h=1).repeat(1, 4, 1, 1)
    assert decorrelation(A, norm).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_one_head_costs_nothing(norm):
    assert decorrelation(heads(h=1), norm).item() == 0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e4])
def test_unchanged_under_scaling_and_permutation(norm, scale):
    A = heads()
    L = decorrelation(A, norm).item()
    scales = torch.tensor([1.0, scale, -scale], dtype=A.dtype)[:, None, None, None]
    assert decorrelation(A * scales, norm).item() == pytest.approx(L, rel=1e-10)
    assert decorrelation(A[:, [2, 0, 3, 1]], norm).item() == pytest.approx(L, rel=1e-12)
    assert decorrelation(A[[2, 0, 1]], norm).item() == pytest.approx(L, rel=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_have_a_finite_value_and_gradient(norm, dtype):
    A = heads(dtype=dtype)
    A[1] = 0  # one whole sample
    A[0, 2] = 0  # one head
    A.requires_grad_()
    L = decorrelation(A, norm)
    assert L.dtype == torch.float32
    assert L.isfinite()
    (gradient,) = torch.autograd.grad(L, A)
    assert gradient.isfinite().all()
    (gradient,) = torch.autograd.grad(decorrelation(zero := torch.zeros_like(A, requires_grad=True), norm), zero)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_against_finite_differences(norm):
    assert torch.autograd.gradcheck(lambda A: decorrelation(A, norm), heads(2, 3, 4, 2).requires_grad_())


@pytest.mark.parametrize("norm", NORMS)
def test_compiled_gradient_is_the_eager_one(norm):
    """The real compiler: it gave gradients of 1e25 for the lengths read as a diagonal, with the value right."""

    def loss(w, A):
        return decorrelation(A @ w, norm)

    w = torch.eye(8, dtype=torch.float64).requires_grad_()
    (eager,) = torch.autograd.grad(loss(w, heads(d=8)), w)
    (mine,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, dynamic=False)(w, heads(d=8)), w)
    torch.testing.assert_close(mine, eager, rtol=1e-10, atol=1e-12)


def test_float32_is_near_float64():
    A = heads(8, 6, 65, 32, dtype=torch.float32)
    assert decorrelation(A).item() == pytest.approx(decorrelation(A.double()).item(), rel=1e-5)


def test_same_under_plain_and_flash_attention(config, batch):
    params = {n: p.double() for n, p in vit.init(config, 0).items()}
    penalties = [
        vit.forward(params, batch[0].double(), config, ops).penalty.item()
        for ops in (decatt(2.0)(EXACT), decatt(2.0)(flash()(EXACT)), flash("tiled")(decatt(2.0)(EXACT)))
    ]
    assert penalties == pytest.approx([penalties[0]] * 3, rel=1e-10)
    assert penalties[0] > 0


def test_weight_and_layers():
    layers = [heads(seed=i) for i in range(3)]
    each = [decorrelation(A).item() for A in layers]
    assert penalty(decatt(1.0), layers).item() == pytest.approx(sum(each) / 3)
    assert penalty(decatt(5.0, layers=[0, -1]), layers).item() == pytest.approx(5 * (each[0] + each[2]) / 2)
    assert penalty(decatt(5.0, layers=[1, 1, 2]), layers).item() == pytest.approx(5 * (2 * each[1] + each[2]) / 3)


def test_a_penalty_of_another_transform_stays():
    """Applied before or after, both are added."""
    other = rewrite("other", wrap={"penalty": lambda inner, site, A: inner(site, A) + A.square().mean()})
    A = heads()
    wanted = A.square().mean().item() + 2 * decorrelation(A).item()
    assert penalty(lambda ops: decatt(2.0)(other(ops)), [A]).item() == pytest.approx(wanted)
    assert penalty(lambda ops: other(decatt(2.0)(ops)), [A]).item() == pytest.approx(wanted)


def test_weight_zero_is_the_identity():
    assert decatt(0.0)(EXACT) is EXACT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -1.0}, "decatt weight -1.0 must be finite and 0 or above"),
        ({"weight": float("nan")}, "decatt weight nan"),
        ({"weight": 1.0, "norm": "frobenus"}, "unknown decatt norm 'frobenus'.*did you mean 'frobenius'"),
        ({"weight": 1.0, "layers": ()}, r"decatt layers \(\)"),
        ({"weight": 1.0, "layers": "last"}, "decatt layers 'last'"),
        ({"weight": 1.0, "layers": 5}, "decatt layers 5; legal: 'all' or block indices"),
        ({"weight": 1.0, "layers": ("a",)}, "decatt layers"),
    ],
)
def test_bad_values_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        decatt(**arguments)


def test_a_layer_the_model_does_not_have_is_refused():
    with pytest.raises(InputError, match="decatt layer 3 does not exist; legal: -2 to 1"):
        penalty(decatt(1.0, layers=(0, 3)), [heads(), heads()])
