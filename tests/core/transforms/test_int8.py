from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ablations.study.arms import parse
from core import rng, vit
from core.account.step import account
from core.errors import InputError
from core.layers import EXACT
from core.ops import Site
from core.transforms.int8 import int8, pack, sloped, unpack

CONFIG = vit.VitConfig(16, 4, 64, 2, 2, 256, 5)


def stochastic_rounding(x, group, key):
    """x [n,D], each group by itself: ActNN's rule, one element at a time, for the same draws."""
    out, draws = x.clone(), rng.uniform(key, (x.shape[0], x.shape[1] // group, 1))
    for i in range(x.shape[0]):
        for g in range(x.shape[1] // group):
            part = x[i, g * group : (g + 1) * group].tolist()
            low, step = min(part), (max(part) - min(part)) / 255
            for j, value in enumerate(part):
                draw = (draws[i, g, 0].item() + j * (5**0.5 - 1) / 2) % 1
                code = (value - low) / step
                up = code - int(code) >= 1 - draw
                out[i, g * group + j] = low + step * (int(code) + up)
    return out


def test_codes_are_the_rule_one_by_one():
    x = torch.randn(3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mine = unpack(pack(x, 8, rng.key(1)), 24, torch.float64)
    # draws are float32 with 24 bits: turned, they differ in the last ones
    assert torch.isclose(mine, stochastic_rounding(x, 8, rng.key(1)), rtol=0, atol=1e-9).float().mean() > 0.98


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rounding_is_unbiased_within_a_step_and_exact_at_the_ends(dtype):
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, low, step = pack(x, 16, rng.key(0))
    assert codes.shape == (2, 3, 2, 16)
    assert codes.dtype == torch.uint8
    draws = torch.stack([unpack(pack(x, 16, rng.key(k)), 32, dtype) for k in range(2000)])
    width = step.expand(codes.shape).flatten(-2)
    assert ((draws - x).abs() <= width * 1.0001).all()
    assert ((draws.mean(0) - x).abs() <= 5 * 0.5 * width / 2000**0.5).all()  # a Bernoulli's deviation is at most 1/2
    assert torch.allclose(draws[0].unflatten(-1, (2, 16)).amin(-1, keepdim=True), low)


@pytest.mark.parametrize(("width", "groups", "size"), [(35, 5, 7), (37, 5, 8), (2, 1, 2), (8, 1, 8)])
def test_odd_widths_are_cut_into_as_few_groups(width, groups, size):
    """Each row by itself is what the rule gives of the row filled up with its last element; constant rows are exact."""
    x = torch.randn(3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    filled = torch.cat((x, x[:, -1:].expand(-1, groups * size - width)), 1)
    codes, low, step = pack(x, 8, rng.key(0))
    assert codes.shape == (3, groups, size)
    mine = unpack((codes, low, step), width, torch.float64)
    rule = stochastic_rounding(filled, size, rng.key(0))[:, :width]
    assert torch.isclose(mine, rule, rtol=0, atol=1e-9).float().mean() > 0.95
    assert ((mine - x).abs() <= step.repeat_interleave(size, 1).squeeze(-1)[:, :width] * 1.0001).all()
    constant = torch.full((2, width), 3.0)
    assert torch.equal(unpack(pack(constant, 8, rng.key(0)), width, torch.float32), constant)


@pytest.fixture
def layer():
    torch.manual_seed(1)
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 9, 8), (5, 8), (5,)))
    return x, w, b, torch.randn(4, 9, 5, dtype=torch.float64)


def linear(ops, x, w, b, key, name="mlp.fc1", before=lambda x: x):
    site = Site(name, {f"{name}.weight": w, f"{name}.bias": b}, CONFIG, ops, key, x.dtype, {})
    return ops.linear(site, before, x)


def test_a_map_is_exact_but_for_its_weight_gradient_which_reads_the_rounded_input(layer):
    x, w, b, G = layer
    ops = int8()(EXACT)
    y, exact = linear(ops, x, w, b, rng.key(0)), F.linear(x, w, b)
    (dx, dw, db), (ex, ew, eb) = (torch.autograd.grad(v, (x, w, b), G) for v in (y, exact))
    assert torch.equal(y, exact)
    assert torch.equal(dx, ex)
    assert torch.equal(db, eb)
    assert 1e-5 < (dw - ew).norm() / ew.norm() < 1e-2


def test_gelus_gradient_is_unbiased_for_its_slopes_are_what_is_rounded():
    y = torch.linspace(-4, 4, 64, dtype=torch.float64)[None].requires_grad_()
    exact = torch.autograd.grad(F.gelu(y).sum(), y)[0]
    draws = []
    for k in range(1500):
        x = sloped(F.gelu, y, group=32, key=rng.key(k))
        assert torch.equal(x, F.gelu(y))
        draws.append(torch.autograd.grad(x.sum(), y)[0])
    draws = torch.stack(draws)
    assert ((draws.mean(0) - exact).abs() <= 5 * draws.std(0) / 1500**0.5 + 1e-6).all()
    assert draws.std(0).max() > 1e-4


def test_without_a_key_nothing_is_rounded_nor_under_fused_attention_at_proj(layer):
    x, w, b, G = layer
    exact = torch.autograd.grad(F.linear(x, w, b), w, G)[0]
    assert torch.equal(torch.autograd.grad(linear(int8()(EXACT), x, w, b, None), w, G)[0], exact)
    fused = parse("flash+int8").ops
    for name, same in (("attn.proj", True), ("attn.qkv", False)):
        assert torch.equal(torch.autograd.grad(linear(fused, x, w, b, rng.key(0), name), w, G)[0], exact) == same


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_bytes_and_flops_are_as_predicted(dropout):
    """11 of 16 u become 11 (1/4 + 2/g) u, and with dropout GELU's mask is needed no more (fc2's input is rounded after
    it); no product is added."""
    config, u = replace(CONFIG, dropout=dropout), 8 * 17 * 64 * 4
    plain, mine = (account(config, ops, 8) for ops in (EXACT, int8()(EXACT)))
    saved = 3 * u * (0.75 - 2 / 64) + 8 * u * (0.75 - 2 / 256) + (u if dropout else 0)
    assert plain.kept_bytes_per_block - mine.kept_bytes_per_block == pytest.approx(saved, rel=0.01)
    assert mine.flops == plain.flops


def test_bad_parameters():
    with pytest.raises(InputError, match="int8 group 1 is too small: at least 2, such as 256"):
        int8(1)
    with pytest.raises(InputError, match="crs and int8 both replace the model's linear"):
        parse("crs@0.5+int8")
