from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from ablations.study.arms import parse
from core import vit
from core.account.step import account
from core.errors import InputError
from core.layers import EXACT
from core.ops import Site, rewrite
from core.transforms.lowbp import BOUNDS, SLOPES, lowbp, pack, unpack

CONFIG = vit.VitConfig(16, 4, 64, 2, 2, 256, 5)


def criterion(bounds, slopes):
    """The paper's: the integral of (GELU - h)^2, h the sum of ReLUs whose slopes add up to `slopes`."""
    x = torch.linspace(-15, 15, 300_001, dtype=torch.float64)
    steps = [b - a for a, b in pairwise(slopes)]
    h = sum(step * F.relu(x - bound) for step, bound in zip(steps, bounds, strict=True))
    return (F.gelu(x) - h).square().sum().item() * 1e-4


def test_the_constants_minimise_the_papers_criterion():
    best = criterion(BOUNDS, SLOPES)
    assert best == pytest.approx(0.009507, rel=1e-4)
    papers = (-3.1858810036855245, -0.001178821281161997, 3.190832613414926), (0, -0.04922261145617846, 1.04874059, 1)
    assert best < criterion(*papers)
    for i in range(3):
        for move in (-0.02, 0.02):
            moved = [b + move * (i == j) for j, b in enumerate(BOUNDS)]
            assert criterion(moved, SLOPES) > best
    for i in (1, 2):
        for move in (-0.001, 0.001):
            assert criterion(BOUNDS, [s + move * (i == j) for j, s in enumerate(SLOPES)]) > best


@pytest.mark.parametrize("n", [1, 4, 35])
def test_two_bits_an_element(n):
    y = torch.linspace(-5, 5, n)
    codes = pack(y)
    assert codes.dtype == torch.uint8
    assert len(codes) == -(-n // 4)
    assert unpack(codes, n).tolist() == [sum(v > b for b in BOUNDS) for v in y.tolist()]


def site(name, x, w, b, ops):
    return Site(name, {f"{name}.weight": w, f"{name}.bias": b}, CONFIG, ops, None, x.dtype, {})


def test_gelu_has_its_value_and_the_slope_of_its_bounds():
    y = torch.linspace(-5, 5, 40, dtype=torch.float64).view(2, 4, 5).requires_grad_()
    w, b = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.zeros(3, dtype=torch.float64)
    ops = lowbp()(EXACT)
    x = ops.linear(site("mlp.fc2", y, w, b, ops), F.gelu, y)
    assert torch.equal(x, F.linear(F.gelu(y), w, b))
    G = torch.randn(2, 4, 3, dtype=torch.float64)
    of_y, of_w = torch.autograd.grad(x, (y, w), G)
    slopes = torch.tensor([SLOPES[sum(v > bound for bound in BOUNDS)] for v in y.flatten().tolist()]).view_as(y)
    torch.testing.assert_close(of_y, (G @ w) * slopes.double(), rtol=1e-6, atol=1e-7)
    assert torch.equal(of_w, torch.autograd.grad(F.linear(F.gelu(y), w, b), w, G)[0])


@pytest.mark.parametrize("name", ["attn.qkv", "mlp.fc1"])
def test_layernorm_and_its_map_are_exact(name):
    torch.manual_seed(0)
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 8), 8, 8, (5, 8), 5)]
    x, scale, shift, w, b = tensors
    ops, G = lowbp()(EXACT), torch.randn(2, 3, 5, dtype=torch.float64)
    mine = ops.linear(site(name, x, w, b, ops), lambda *_: None, x, scale, shift)
    exact = F.linear(F.layer_norm(x, (8,), scale, shift, CONFIG.eps), w, b)
    torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-12)
    for one, other in zip(*(torch.autograd.grad(v, tensors, G) for v in (mine, exact)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("norms", "shared"), [(True, 2), (False, 0)])
def test_bytes_and_flops_are_as_predicted(norms, shared):
    """GELU keeps 2 of 32 bits of 4 u, each norm and map one tensor less."""
    u = 8 * 17 * 64 * 4
    plain, mine = (account(CONFIG, ops, 8) for ops in (EXACT, lowbp(norms)(EXACT)))
    saved = (4 * (1 - 2 / 32) + shared) * u
    assert plain.kept_bytes_per_block - mine.kept_bytes_per_block == pytest.approx(saved, rel=0.01)
    assert mine.flops == plain.flops


def test_what_it_does_by_itself_nobody_else_can_change():
    other = rewrite("other", wrap={"norm": lambda inner, site, *inputs: inner(site, *inputs)}, at=("norm1",))
    with pytest.raises(InputError, match=r"lowbp does the model's norm at norm1, norm2 by itself, and other"):
        other(lowbp()(EXACT))
    assert other(lowbp(norms=False)(EXACT)).parts
    with pytest.raises(InputError, match="lowbp and recompute both replace the model's linear"):
        parse("lowbp+recompute")
