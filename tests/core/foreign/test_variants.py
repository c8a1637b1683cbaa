"""Modules in which something is not as in most: what a transform would get wrong it leaves alone, or is refused."""

import pytest
from foreign import CLASSES, IMAGE, distance, run

from core.foreign import sources


@pytest.fixture
def load(written):
    return lambda *changes: sources.load(written(*changes), IMAGE, 3, CLASSES)


def roles(config, block=0):
    return {name: place.role for name, place in config.places.items() if place.block == block}


def test_what_a_norm_or_gelu_gave_is_changed_in_place(load):
    config = load(("self.first(x))", "self.first(x).mul_(0.5))"), ('approximate="tanh")', 'approximate="tanh").mul_(2)'))
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
