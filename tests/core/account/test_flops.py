"""FLOPs of every registered optimization at every value of its first parameter, against arithmetic by hand."""

from math import floor

import pytest
import torch

from ablations.study.arms import parse
from core import vit
from core.account.flops import flops
from core.account.step import account
from core.layers import EXACT

CONFIG, B = vit.VitConfig(image=16, patch=4, width=32, depth=2, heads=2, mlp=64, classes=10), 4
D, M, DEPTH, HEADS = CONFIG.width, CONFIG.mlp, CONFIG.depth, CONFIG.heads
B16 = vit.VitConfig(image=224, patch=16, width=768, depth=12, heads=12, mlp=3072, classes=1000)


def plain(N, patches):
    """A step: the gradients of a product are two products more; the image needs none. Then a forward pass."""
    embed = 2 * B * (N - 1) * patches * D
    blocks = DEPTH * (2 * B * N * (4 * D * D + 2 * D * M) + 2 * 2 * B * N * N * D)
    head = 2 * B * D * CONFIG.classes
    return 2 * embed + 3 * (blocks + head), embed + blocks + head


def sampled(N, ratio, maps):
    """What `crs` saves of the weights' gradients; the class tokens' rows and one other are always there."""
    rows = max(floor(ratio * B * N), B + 1)
    return DEPTH * 2 * (B * N - rows) * maps


N = CONFIG.tokens
PLAIN, FORWARD = plain(N, 3 * 4 * 4)
QKV, PROJ, MLP = 3 * D * D, D * D, 2 * D * M
GRAM = DEPTH * 2 * B * HEADS * HEADS * N * (D // HEADS)
CRS_PRODUCTS = {  # of one head: both gradients of q k^T and of the weights times v
    "exact": 4 * N * N * (D // HEADS),
    0.5: N * 8 * 16 + 16 * 8 * N + N * 8 * N + N * 8 * 16,  # 8 of 17 columns or rows, and 8 of 16 columns of v
}
LAW = {
    "baseline": PLAIN,
    "flash@sdpa": PLAIN,
    "flash@flash-attn": PLAIN,
    "flash@flash-attn-4": PLAIN,
    "flash@tiled": PLAIN + DEPTH * 2 * B * N * N * D,  # the scores again, in operations of its own
    "recompute": PLAIN,
    "recompute@True": PLAIN + DEPTH * 2 * B * N * D * M,  # fc1 again
    "decatt": PLAIN + 3 * GRAM,
    "crs@0.5": PLAIN - sampled(N, 0.5, QKV + PROJ + MLP),
    "crs@0.3": PLAIN - sampled(N, 0.3, QKV + PROJ + MLP),
    "crs@0.3+flash": PLAIN - sampled(N, 0.3, QKV + MLP),
    "uniform@4": PLAIN,
    "uniform@2": plain(8 * 8 + 1, 3 * 2 * 2)[0],
    "mrt@28": plain(28 + 1, 3 * 2 * 2)[0],
    "mrt@64": plain(64 + 1, 3 * 2 * 2)[0],
    "crs@0.3+decatt+flash+mrt@28": plain(29, 12)[0] - sampled(29, 0.3, QKV + MLP) + 3 * GRAM * 29 // N,
}


@pytest.mark.parametrize("name", LAW)
def test_flops_by_hand(name):
    arm = parse(name)
    assert account(arm.ops.config(CONFIG), arm.ops, B).flops == LAW[name]


def test_a_forward_pass():
    for name in ("baseline", "flash", "flash@tiled", "flash@flash-attn", "crs@0.3", "recompute@True"):
        assert account(CONFIG, parse(name).ops, B, mode="eval").flops == FORWARD


def test_crs_of_the_attention_products():
    ops = parse("crs@0.5", {"crs": {"scope": "published"}}).ops
    saved = CRS_PRODUCTS["exact"] - CRS_PRODUCTS[0.5]
    assert account(CONFIG, ops, B).flops == PLAIN - sampled(N, 0.5, QKV) - 2 * DEPTH * B * HEADS * saved


def test_resized_images_cost_what_the_larger_ones_do():
    settings = {"mrt": {"image": 16, "tokens": 28}, "uniform": {"image": 16}}
    for name in ("mrt", "uniform@2"):
        arm = parse(name, settings)
        config = arm.ops.config(CONFIG)
        assert account(config, arm.ops, B, image=8).flops == account(config, arm.ops, B).flops


def test_vit_b_16():
    """105.15 GFLOP an image, whatever the kernel and the version of torch."""
    for name in ("baseline", "flash", "flash@flash-attn"):
        assert account(B16, parse(name).ops, 1).flops == pytest.approx(105.15e9, rel=1e-4)


@pytest.mark.parametrize("kernel", ["flash_attention", "flash_attention_for_cpu", "efficient_attention"])
def test_a_fused_kernel_counts_as_its_products(kernel):
    """Forward by its values' shapes; the same names on every version of torch."""
    q, k, v = torch.empty(2, 3, 5, 8), torch.empty(2, 3, 7, 8), torch.empty(2, 3, 7, 4)
    forward = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}").default
    backward = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_backward").default
    products = 2 * (2 * 3 * 5 * 7 * 8 + 2 * 3 * 5 * 7 * 4)
    assert flops(forward, (q, k, v), {}, None) == products
    assert flops(backward, (q[..., :4], q, k, v), {}, None) == 2 * products


def test_exact_arms_have_one_numerator():
    assert account(CONFIG, EXACT, B).flops == account(CONFIG, parse("flash+recompute").ops, B).flops
