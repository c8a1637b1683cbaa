import pytest
import torch
import torch.nn.functional as F

from ablations.study.arms import parse
from core import rng, vit
from core.account.step import account
from core.errors import InputError
from core.layers import EXACT
from core.ops import Site
from core.transforms.dropit import dropit

CONFIG = vit.VitConfig(16, 4, 64, 2, 2, 256, 5)


@pytest.fixture
def layer():
    torch.manual_seed(1)
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 9, 6), (5, 6), (5,)))
    return x, w, b, torch.randn(4, 9, 5, dtype=torch.float64)


def linear(ops, x, w, b, name="mlp.fc1"):
    site = Site(name, {f"{name}.weight": w, f"{name}.bias": b}, CONFIG, ops, rng.key(0), x.dtype, {})
    return ops.linear(site, lambda x: x, x)


def without_the_smallest(x, rate):
    """The authors' rule: the k = int(n (1 - rate)) largest magnitudes of the whole tensor stay, the others are 0."""
    kept = int(x.numel() * (1 - rate))
    order = sorted(range(x.numel()), key=lambda i: -abs(x.flatten()[i].item()))
    sparse = torch.zeros(x.numel(), dtype=x.dtype)
    sparse[order[:kept]] = x.flatten()[order[:kept]]
    return sparse.view_as(x)


@pytest.mark.parametrize("rate", [0.3, 0.7, 0.9])
def test_the_weight_gradient_alone_reads_the_largest_elements(layer, rate):
    x, w, b, G = layer
    y, exact = linear(dropit(rate)(EXACT), x, w, b), F.linear(x, w, b)
    (dx, dw, db), (ex, _, eb) = (torch.autograd.grad(v, (x, w, b), G) for v in (y, exact))
    assert torch.equal(y, exact)
    assert torch.equal(dx, ex)
    assert torch.equal(db, eb)
    wanted = torch.einsum("bno,bni->oi", G, without_the_smallest(x.detach(), rate))
    torch.testing.assert_close(dw, wanted, rtol=1e-12, atol=1e-12)


def test_proj_is_left_alone_under_fused_attention(layer):
    x, w, b, G = layer
    exact = torch.autograd.grad(F.linear(x, w, b), w, G)[0]
    for ops, same in ((parse("dropit+flash").ops, True), (parse("dropit").ops, False)):
        assert torch.equal(torch.autograd.grad(linear(ops, x, w, b, "attn.proj"), w, G)[0], exact) == same


@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_bytes_and_flops_are_as_predicted(rate):
    """7 u of inputs become values and indices of a share: 2 (1 - rate) of them in float32."""
    u = 8 * 17 * 64 * 4
    plain, mine = (account(CONFIG, ops, 8) for ops in (EXACT, dropit(rate)(EXACT)))
    saved = 7 * u * (1 - 2 * (1 - rate))
    assert plain.kept_bytes_per_block - mine.kept_bytes_per_block == pytest.approx(saved, rel=0.01, abs=100)
    assert mine.flops == plain.flops


def test_bad_parameters():
    for rate in (1.0, -0.1, float("nan")):
        with pytest.raises(InputError, match=rf"dropit rate {rate} is outside \[0, 1\)"):
            dropit(rate)
    assert dropit(0.0)(EXACT) is EXACT
