from collections import Counter
from dataclasses import replace

import pytest

from ablations.study.arms import parse
from core import vit
from core.account import graphs
from core.account.graphs import Change, Difference, Resized

CONFIG = vit.VitConfig(image=32, patch=4, width=32, depth=3, heads=2, mlp=64, classes=10)


def of(name, config=CONFIG, batch=8):
    return graphs.trace(config, parse(name).ops, batch)


def test_flash_replaces_the_products_of_attention():
    plain, flash = of("baseline"), of("flash")
    change = graphs.difference(plain, flash)
    assert change.kept_bytes == flash.kept_bytes - plain.kept_bytes < 0
    assert change.forward.new["_scaled_dot_product_flash_attention_for_cpu"] == CONFIG.depth
    assert change.backward.new["_scaled_dot_product_flash_attention_for_cpu_backward"] == CONFIG.depth
    assert change.forward.gone["bmm"] == 2 * CONFIG.depth
    assert change.backward.gone["bmm"] == 4 * CONFIG.depth
    same = Change(Counter(), Counter(), Counter())
    assert graphs.difference(plain, plain) == Difference(same, same, 0)


def test_crs_shortens_the_products_of_the_backward_pass():
    config, rows = replace(CONFIG, depth=1), 8 * CONFIG.tokens
    change = graphs.difference(of("flash", config), of("crs@0.3+flash", config))
    assert change.backward.resized == {Resized("mm", rows, int(0.3 * rows)): 3}
    assert not change.forward.resized
    assert (change.forward.new + change.backward.new)["sort"] >= 3
    said = graphs.sentence(change)
    assert f"backward: 3 mm of {rows} rows become {int(0.3 * rows)}, + 3 " in said
    assert said.endswith(" GB")


def test_recompute_changes_no_product():
    change = graphs.difference(of("baseline"), of("recompute"))
    assert change.kept_bytes < 0
    assert not any(name.endswith("mm") for name in (change.backward.gone + change.backward.new))


@pytest.mark.parametrize("name", ["flash", "tome"])
def test_a_deep_model_follows_from_its_third_block_if_blocks_are_alike(name):
    config = vit.VitConfig(image=16, patch=4, width=16, depth=5, heads=2, mlp=32, classes=5)
    ops = parse(name).ops
    guessed, whole = graphs.trace(config, ops, 8), graphs._traced(config, ops, 8, graphs.torch.float32)
    assert guessed.kept_bytes == pytest.approx(whole.kept_bytes, rel=0.01)
    assert (guessed.forward, guessed.backward) == (whole.forward, whole.backward)


@pytest.mark.parametrize("name", ["flash@flash-attn", "flash@flash-attn-4"])
def test_a_kernel_that_is_not_here_is_traced(name):
    change = graphs.difference(of("baseline", replace(CONFIG, depth=1)), of(name, replace(CONFIG, depth=1)))
    assert change.forward.new["flash_attn"] == change.backward.new["flash_attn_backward"] == 1
