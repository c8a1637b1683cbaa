"""Modules in which something is not as in most: what a transform would get wrong it leaves alone, or is refused."""

import pytest
import torch
from foreign import CLASSES, IMAGE, batch_of, distance, moved, run

from ablations.study.arms import parse
from core import model
from core.errors import InputError
from core.foreign import sources
from core.layers import EXACT
from core.optimizers import AdamW


@pytest.fixture
def load(written):
    return lambda *changes: sources.load(written(*changes), IMAGE, 3, CLASSES)


def roles(config, block=0):
    return {name: place.role for name, place in config.places.items() if place.block == block}


def test_what_a_norm_or_gelu_gave_is_changed_in_place(load):
    gelu = 'approximate="tanh")', 'approximate="tanh").mul_(2)'
    config = load(("self.first(x))", "self.first(x).mul_(0.5))"), gelu)
    value, _, exact = run(config)
    for arm in ("recompute", "lowbp"):  # GELU of which is left alone, and so is no approximation
        other, _, gradients = run(config, arm)
        assert other.item() == pytest.approx(value.item(), rel=1e-12)
        assert distance(gradients, exact) < 1e-9
    assert run(config, "int8")[0].item() == pytest.approx(value.item(), rel=1e-12)
    assert "mlp.fc1" in roles(config).values()


def test_a_branch_beside_the_attention_reads_the_same_norm(load):
    """What it reads is not kept past the attention for its sake."""
    first = "q, k, v = self.to_qkv(self.first(x))", "n = self.first(x); q, k, v = self.to_qkv(n)"
    config = load(first, ("self.up(self.second(x))", "self.up(n)"))
    assert roles(config)["layers.0.to_qkv"] == "attn.qkv"
    value, _, exact = run(config)
    other, _, gradients = run(config, "recompute")
    assert other.item() == pytest.approx(value.item(), rel=1e-12)
    assert distance(gradients, exact) < 1e-9


def test_a_second_head_is_a_head(load):
    """Of a distilled DeiT."""
    second = "nn.Linear(D, classes)", "nn.Linear(D, classes); self.other = nn.Linear(D, classes)"
    config = load(second, ("self.answer(self.scale * x.mean(1))", "self.answer(x.mean(1)) + self.other(x[:, 0])"))
    _, _, gradients = run(config, "lora")
    assert {"answer.weight", "answer.bias", "other.weight", "other.bias"} < gradients.keys()
    assert all(".lora." in n or n.split(".")[0] in ("answer", "other") for n in gradients)


@pytest.mark.parametrize("d", [4, 8])
def test_heads_of_another_width(load, d):
    """q, k and v have 2 heads of 4 where the model's width is 16."""
    maps = ("3 * D, bias=False), nn.Linear(D, D)", f"6 * {d}, bias=False), nn.Linear(2 * {d}, D)")
    config = load(maps, ("D // self.h)", f"{d})"), ("reshape(B, N, D)", f"reshape(B, N, {2 * d})"))
    value, *_ = run(config)
    other, _, gradients = run(config, "flash+crs@1")
    assert other.item() == pytest.approx(value.item(), rel=1e-12)
    optimizer = model.fit(parse("muon").ops, config).optimizer(AdamW(1e-2))
    if d == 8:
        run(config, "qknorm+lora")
        optimizer.init(gradients)
        return
    for arm, message in (("qknorm", "heads 8 wide, and this model has some 4"), ("lora", "16 inputs and 48 outputs")):
        with pytest.raises(InputError, match=f"{message}.*; leave {arm} out"):
            run(config, arm)
    with pytest.raises(InputError, match="muon takes blocks.0.attn.qkv.weight .* 24 x 16; leave muon out"):
        optimizer.init(gradients)


def test_values_narrower_than_queries(load):
    """The fused kernels do not take them."""
    maps = "nn.Linear(D, D)\n", "nn.Linear(D // 2, D)\n"
    config = load(maps, ("attention(q, k, v)", "attention(q, k, v[..., :4])"), ("(B, N, D)", "(B, N, 8)"))
    assert config.reached["masked"] == 2
    with pytest.raises(InputError, match=r"flash changes .*\(it has 2 with a mask, or other shapes\); leave it out"):
        run(config, "flash")


def test_queries_by_a_convolution(load):
    """Its block's attention is its block's."""
    maps = "nn.Linear(D, 3 * D, bias=False)", "nn.Conv1d(D, 3 * D, 1, bias=False)"
    config = load(maps, ("self.to_qkv(self.first(x))", "self.to_qkv(self.first(x).mT).mT"))
    assert config.reached["attend"] == 2
    assert roles(config)["layers.0.to_qkv"] == "to_qkv"
    assert roles(config)["layers.0.out"] == "attn.proj"
    _, _, exact = run(config)
    _, _, gradients = run(config, "recompute")
    assert distance(gradients, exact) < 1e-9
    _, _, gradients = run(config, "qknorm")
    assert all(gradients[f"blocks.{i}.attn.qknorm.k"].any() for i in range(2))


def test_a_map_that_is_called_twice(load):
    """It has no place, so that no transform takes one of its calls for the other."""
    maps = "nn.Linear(D, 2 * D), nn.Linear(2 * D, D)", "nn.Linear(D, D), None"
    config = load(maps, ("self.down(F.gelu(self.up(", "self.up(F.gelu(self.up("))
    assert roles(config)["layers.0.up"] == "layers.0.up"
    _, _, exact = run(config)
    for arm in ("recompute", "lowbp"):
        _, _, gradients = run(config, arm)
        assert distance(gradients, exact) < 1e-9
    with pytest.raises(InputError, match="droppath changes the model's"):
        run(config, "droppath@0.5")


def test_a_norm_that_is_not_trained_computes_like_the_others(load):
    """In the precision of the parameters."""
    config = load(("self.second = nn.LayerNorm(D)", "self.second = nn.LayerNorm(D).requires_grad_(False)"))
    own = config.build(0).double()
    images, labels = batch_of(config)
    own.load_state_dict(moved(config, EXACT), strict=False)
    assert run(config)[0].item() == torch.nn.functional.cross_entropy(own(images), labels).item()
