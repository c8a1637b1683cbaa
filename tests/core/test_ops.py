"""How transforms compose: who replaces, who wraps, who is refused, and what they bring besides functions."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

from core import rng, vit
from core.errors import InputError
from core.initializers import uniform
from core.layers import EXACT
from core.model import parameters
from core.ops import Parameter, Site, rewrite
from core.optimizers import AdamW
from core.transforms.crs import crs
from core.transforms.decatt import decatt
from core.transforms.flash import flash
from core.transforms.readout import readout
from core.transforms.recompute import recompute
from core.transforms.tome import tome


def doubled(name, **options):
    """A wrapper of linear: its result times two."""
    return rewrite(name, wrap={"linear": lambda inner, *args: 2 * inner(*args)}, **options)


def plus(name, amount):
    """A wrapper of mlp that does not commute with `doubled`."""
    return rewrite(name, wrap={"mlp": lambda inner, site, x: inner(site, x) * 2 + amount})


def call(ops, name="attn.qkv"):
    """`linear` of ones at this site: 3 x 2 ones times ones of 4 x 2, plus 1."""
    params = {f"{name}.weight": torch.ones(4, 2), f"{name}.bias": torch.ones(4)}
    site = Site(name, params, None, ops, None, torch.float32, {})
    return ops.linear(site, lambda x: x, torch.ones(3, 2))


def test_exact_linear_is_torchs():
    assert torch.equal(call(EXACT), F.linear(torch.ones(3, 2), torch.ones(4, 2), torch.ones(4)))


def test_a_wrapper_and_a_replacer_compose_in_either_order():
    zero = rewrite("zero", replace={"linear": lambda site, before, *inputs: before(*inputs) * 0 + 5})
    for first, second in ((zero, doubled("two")), (doubled("two"), zero)):
        assert (call(second(first(EXACT))) == 10).all()


def test_wrappers_compose_by_name_whatever_the_order(config, batch):
    """Three that do not commute as functions."""
    transforms = [plus("a", 1.0), plus("b", 3.0), plus("c", -2.0)]
    params, results = vit.init(config, 0), []
    for order in permutations(transforms):
        ops = EXACT
        for transform in order:
            ops = transform(ops)
        results.append(vit.forward(params, batch[0], config, ops).logits)
    assert all(torch.equal(results[0], r) for r in results)
    assert [part.name for part in ops.parts] == ["a", "b", "c"]


def test_changes_are_made_at_the_named_sites_only():
    ops = doubled("two", at=("attn.proj",))(EXACT)
    assert torch.equal(call(ops, "attn.qkv"), call(EXACT))
    assert torch.equal(call(ops, "attn.proj"), 2 * call(EXACT))


def test_replacers_of_one_primitive_meet_only_at_one_place():
    def at(name, *places):
        return rewrite(name, replace={"linear": lambda *args: 0}, at=places or None)

    ops = at("second", "mlp.fc1")(at("first", "attn.qkv", "attn.proj")(EXACT))
    assert call(ops, "attn.qkv") == call(ops, "mlp.fc1") == 0
    for clash in (at("third", "mlp.fc1", "mlp.fc2"), at("third")):
        with pytest.raises(InputError, match="second and third both replace the model's linear|first and third both"):
            clash(ops)


def test_a_refusal_names_both_and_what_they_replace():
    for first, second in permutations((crs(0.5), recompute())):
        with pytest.raises(InputError, match="crs and recompute both replace the model's linear; choose one"):
            second(first(EXACT))
    with pytest.raises(InputError, match="crs and flash both replace the model's attend; choose one"):
        flash()(crs(0.5, scope="published")(EXACT))


@pytest.mark.parametrize("place", ["mlp.fc1", "mlp.fc2", None])
def test_nobody_changes_what_a_replacement_does_by_itself(place):
    """recompute(fc1=True) never calls linear in the MLP: a wrapper there would be lost without a word."""
    wrapper = doubled("two", at=None if place is None else (place,))
    for first, second in permutations((wrapper, recompute(fc1=True))):
        with pytest.raises(InputError, match="recompute does the model's linear at .*mlp.fc1.*, and two changes it"):
            second(first(EXACT))
    recompute(fc1=True)(doubled("two", at=("attn.qkv",))(EXACT))


def test_what_transforms_bring(config):
    ops = rewrite(
        "more",
        config=lambda c: replace(c, width=2 * c.width),
        parameters=lambda c: {
            "blocks.1.more": Parameter((c.width,), 0.5),
            "more.draws": Parameter((7,), uniform(2.0)),
        },
        frozen=lambda name: name.startswith("head"),
        optimizer=lambda inner: replace(inner, learning_rate=inner.learning_rate / 10),
    )(EXACT)
    wide = ops.config(config)
    assert (wide.width, EXACT.config(config)) == (2 * config.width, config)
    params = vit.init(wide, 0, ops)
    assert torch.equal(params["blocks.1.more"], torch.full((wide.width,), 0.5))
    assert params["more.draws"].abs().max() <= 2 < 100 * params["more.draws"].abs().max()
    assert parameters(wide, ops) == parameters(wide) + wide.width + 7
    assert all(torch.equal(params[n], p) for n, p in vit.init(wide, 0).items()), "it moved other initial values"
    assert ops.frozen("head.weight")
    assert not ops.frozen("norm.weight")
    assert ops.optimizer(AdamW(0.1)).learning_rate == pytest.approx(0.01)


@pytest.mark.parametrize(("rewrites", "alike"), [
    (decatt(layers=(0, -1)), True), (decatt(layers=(3,)), False), (readout(), True), (tome(2), False),
])  # fmt: skip
def test_blocks_are_alike_unless_one_inside_is_told_apart(rewrites, alike):
    assert rewrites(EXACT).alike(5) == alike


def test_a_transform_freezes_nothing_that_another_one_brings():
    freezes = rewrite("low", frozen=lambda name: True)
    brings = rewrite("token", parameters=lambda c: {"token": Parameter((c.width,))})
    both = brings(freezes(EXACT))
    assert both.frozen("head.weight")
    assert not both.frozen("token")


def test_parameters_carry_the_name_of_who_brings_them(config):
    with pytest.raises(ValueError, match="mine brings yours"):
        rewrite("mine", parameters=lambda c: {"yours": Parameter((1,))})(EXACT).parameters(config)


def test_what_only_one_can_bring(config):
    def optimizer(name):
        return rewrite(name, optimizer=lambda inner: inner)

    with pytest.raises(InputError, match="a and b both bring an optimizer; choose one"):
        optimizer("b")(optimizer("a")(EXACT))

    def depth(name, n):
        return rewrite(name, config=lambda c: replace(c, depth=n))

    assert depth("b", 7)(depth("a", 7)(EXACT)).config(config).depth == 7
    with pytest.raises(InputError, match="a wants depth=8 and b depth=7; choose one"):
        depth("b", 7)(depth("a", 8)(EXACT)).config(config)


def test_a_replacement_may_do_other_primitives_by_itself():
    fused = rewrite("fused", replace={"attention": lambda site, x: (x, {})}, inside=("attend",))
    for other in (rewrite("o", wrap={"attend": print}), rewrite("o", replace={"attend": print})):
        for first, second in permutations((fused, other)):
            with pytest.raises(InputError, match="fused does the model's attend .* by itself, and o changes it"):
                second(first(EXACT))


def test_innermost_wrappers_see_what_the_others_made():
    def adds(name, n, **options):
        return rewrite(name, wrap={"penalty": lambda inner, site, x: inner(site, x + n)}, **options)

    seen = []
    last = rewrite("a", wrap={"penalty": lambda inner, site, x: seen.append(x) or inner(site, x)}, innermost=True)
    for first, second in permutations((adds("b", 1), last)):
        second(first(EXACT)).penalty(None, torch.zeros(1))
    assert seen == [torch.ones(1)] * 2
    with pytest.raises(InputError, match="a and c both wrap the model's penalty innermost"):
        adds("c", 1, innermost=True)(last(EXACT))


def test_what_a_block_hands_on_unchanged_is_a_new_tensor(config, batch):
    """Under a compiled region an input that comes back is miscomputed."""
    x, given = torch.zeros(1, 3, config.width), torch.ones(2)
    run = vit.blockwise(config, rewrite("idle", replace={"block": lambda site, x: (x, site.carry)})(EXACT), x.dtype)
    y, carry = run({}, None, x, {"given": given}, None)
    assert torch.equal(y, x)
    assert torch.equal(carry["given"], given)
    assert y is not x
    assert carry["given"] is not given


def test_a_block_gets_its_own_parameters_and_its_number_on_demand(config, batch):
    seen = []

    def block(inner, site, x):
        seen.append((site.block, site.params["norm1.bias"]))
        return inner(site, x)

    params = vit.init(config, 0)
    for positional in (False, True, (-1,)):
        vit.forward(params, batch[0], config, rewrite("look", wrap={"block": block}, positional=positional)(EXACT))
    assert [number for number, _ in seen] == [None, None, 0, 1, None, 1]
    assert [bias for _, bias in seen] == [params[f"blocks.{i}.norm1.bias"] for i in 3 * (0, 1)]


def test_keys_belong_to_names():
    """A name and a purpose have one key in whatever order they are asked for; others have others."""
    site = Site("mlp", {}, None, EXACT, rng.key(3), torch.float32, {})
    keys = [site.key("dropout"), site.key("other"), site.child("fc1").key("dropout"), site.child("fc2").key("dropout")]
    assert len({tuple(key.tolist()) for key in keys}) == 4
    assert torch.equal(site.key("dropout"), keys[0])
    assert site._replace(keys=None).key("dropout") is None
