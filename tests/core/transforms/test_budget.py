from dataclasses import replace
from itertools import pairwise, product
from math import ceil

import pytest
import torch

from ablations.study.arms import parse
from core import rng, vit
from core.account.step import account, planned
from core.errors import InputError
from core.layers import EXACT
from core.measure import peak_bytes
from core.ops import rewrite
from core.optimizers import AdamW, Averaged
from core.parallel import Share
from core.step import make_step, objective, start, value_and_grad
from core.targets import Targets
from core.transforms.budget import LEVELS, budget, rebuilt_weights
from core.transforms.decatt import decatt
from core.transforms.planning import candidates, choose_plan, read_size

SMALL = vit.VitConfig(image=32, patch=4, width=32, depth=3, heads=2, mlp=128, classes=10)
BATCH = 16
PRICES = {(): (0, 0), ("norm",): (0, 2), ("weights",): (1, 3), ("mlp",): (5, 9), ("all",): (9, 12)}


def test_candidates_are_those_of_brute_force():
    """Over all plans of 3 blocks: for every number of bytes to save, the cheapest plan that saves them."""
    found = candidates(PRICES, 3)
    plans = [[sum(PRICES[level][i] for level in plan) for i in (0, 1)] for plan in product(PRICES, repeat=3)]
    for need in range(37):
        best = min((flops, saved) for flops, saved in plans if saved >= need)
        first = next(c for c in found if c.rebuilt >= need)
        assert (first.flops, first.rebuilt) == best
    heaviest_first = [PRICES[level] for level in found[-4].levels]
    assert heaviest_first == sorted(heaviest_first, reverse=True)


def plan_of(ops):
    """(predicted peak, FLOPs) of a planned step."""
    cost = account(SMALL, ops, BATCH)
    return cost.peak_bytes, cost.flops


@pytest.mark.parametrize("first", ["flash", "decatt"])
def test_peaks_are_within_the_size(first):
    base = parse(first).ops if first == "flash" else decatt(layers=(1,))(EXACT)  # one that fewer blocks have not
    whole, flops = plan_of(base)
    assert plan_of(planned(SMALL, budget("1")(base), BATCH)) == (whole, flops)
    peak, cost = plan_of(planned(SMALL, budget("0.6")(base), BATCH))
    assert peak <= 0.6 * whole
    assert cost > flops or first == "flash"


def test_a_larger_size_has_a_peak_no_smaller_and_costs_no_more():
    """A hundred sizes, from the least that can be had to one that needs no plan."""
    config, accounts = replace(SMALL, depth=2, image=16), {}

    def cost(plan, config):
        key = tuple(plan), config.depth
        if key not in accounts:
            accounts[key] = account(config, budget(plan=plan)(EXACT), BATCH)
        return accounts[key]

    with pytest.raises(InputError) as refusal:
        choose_plan("1KB", LEVELS, config, config, cost)
    least, whole = read_size(str(refusal.value).split()[-1]), cost(LEVELS[:1], config).peak_bytes
    sizes = [ceil((least + (whole - least) * i / 99) / 1000) for i in range(100)]
    found = [cost(choose_plan(f"{size}KB", LEVELS, config, config, cost), config) for size in sizes]
    assert all(one.peak_bytes <= 1000 * size for one, size in zip(found, sizes, strict=True))
    for smaller, larger in pairwise(found):
        assert smaller.peak_bytes <= larger.peak_bytes
        assert smaller.flops >= larger.flops
    assert found[-1].peak_bytes == whole
    assert len({one.flops for one in found}) > 5


@pytest.mark.parametrize("share", ["0.5", "0.7", "0.9"])
def test_predicted_peak_is_the_measured_one(share):
    ops = planned(SMALL, budget(share)(EXACT), BATCH)
    step = make_step(objective(SMALL, ops, lambda i, k: i.float() / 255), AdamW(), ops)
    batch = torch.zeros(BATCH, 3, 32, 32, dtype=torch.uint8), torch.zeros(BATCH, dtype=torch.int64)
    state = start(vit.init(SMALL, 0), AdamW(), rng.key(0))
    step(state, batch)
    measured = peak_bytes(step, state, batch, device=torch.device("cpu"))
    assert account(SMALL, ops, BATCH).peak_bytes == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("level", LEVELS, ids="+".join)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_every_level_is_exact(level, dropout):
    """Also with dropout, whose masks must be the same in both passes."""
    config = replace(SMALL, depth=1, dropout=dropout, image=16)
    params = {n: p.double() for n, p in vit.init(config, 0).items()}
    batch = rng.uniform(rng.key(1), (3, 3, 16, 16)).double(), torch.arange(3)
    (loss, _, exact), (other, _, mine) = (
        value_and_grad(objective(config, ops, lambda i, k: i, torch.float64))(params, batch, rng.key(2))
        for ops in (EXACT, budget(plan=[level])(EXACT))
    )
    assert loss.item() == pytest.approx(other.item(), rel=1e-12)
    for n in exact:
        assert torch.allclose(exact[n], mine[n], rtol=1e-9, atol=1e-12), n


def test_attention_weights_are_rebuilt_exactly():
    torch.manual_seed(0)
    q, k, v, G = (torch.randn(2, 2, 5, 4, dtype=torch.float64) for _ in range(4))
    inputs = [t.requires_grad_() for t in (q, k, v)]
    exact = torch.nn.functional.scaled_dot_product_attention(*inputs)
    mine = rebuilt_weights(*inputs)
    torch.testing.assert_close(mine, exact)
    for a, b in zip(*(torch.autograd.grad(y, inputs, G) for y in (mine, exact)), strict=True):
        torch.testing.assert_close(a, b)


def test_flops_are_those_of_what_is_rebuilt():
    B, N, D, M = 4, 65, 32, 128
    plain = account(SMALL, EXACT, B).flops
    for level, products in ((("norm1", "norm2", "gelu"), 0), (("weights",), N * N * D), (("mlp",), N * D * M)):
        found = account(SMALL, budget(plan=[level])(EXACT), B).flops - plain
        assert found == 2 * B * products * SMALL.depth, level


def test_other_blocks_have_other_levels():
    mixed = budget(plan=[("mlp",), (), ("gelu",)])(EXACT)
    kept = account(SMALL, mixed, 4).kept_by_block
    assert kept["0"] < kept["2"] < kept["1"]


def test_a_size_below_the_least_names_it_and_that_is_had():
    with pytest.raises(InputError, match=r"budget 10KB is below the least .* write ([\d.]+[KMG]B)") as refusal:
        planned(SMALL, budget("10KB")(EXACT), BATCH)
    least = str(refusal.value).split()[-1]
    peak, _ = plan_of(planned(SMALL, budget(least)(EXACT), BATCH))
    assert peak <= read_size(least) <= peak * 1.01


def test_bad_input():
    with pytest.raises(InputError, match="budget 1.5 is no share in .*such as 3GB"):
        budget("1.5")
    with pytest.raises(InputError, match="budget 'much' is no size"):
        parse("budget@much")
    with pytest.raises(InputError, match="unknown tensor of a budget's plan 'norm'; legal: norm1, weights"):
        budget(plan=[("norm",)])
    with pytest.raises(InputError, match="budget's plan is of 2 blocks, and the model has 3"):
        account(SMALL, budget(plan=[(), ("mlp",)])(EXACT), 2)
    with pytest.raises(InputError, match="budget and recompute both replace the model's (linear|mlp)"):
        parse("budget@3GB+recompute")


def test_a_plan_is_made_for_the_very_step():
    """Its precision, optimizer, images, targets, and a process's share of it."""
    seen = []
    asks = rewrite("asks", plan=lambda rest, config, cost: seen.append(cost(rest, config)) or rest)(EXACT)
    how = {"optimizer": Averaged(AdamW(), 0.9), "share": Share(0, 2, True), "targets": Targets(0.8, 0.1)}
    planned(SMALL, asks, 4, torch.bfloat16, **how)
    assert seen == [account(SMALL, EXACT, 4, torch.bfloat16, **how)]
    assert seen != [account(SMALL, EXACT, 4, torch.bfloat16, **how | {"share": Share(0, 2)})]
