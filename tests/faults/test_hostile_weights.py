"""Checkpoints, damaged, forged and hostile: refused in one message, or right."""

import json
import struct

import pytest
import torch
from faults.hostile import JSON, refusable, tries
from hypothesis import given
from hypothesis import strategies as st

from ablations.study import evaluation
from ablations.study.recipes import Recipe
from core import vit
from core.weights import checkpoints, pretrained

CONFIG = vit.VitConfig(image=8, patch=4, width=8, depth=1, heads=2, mlp=16, classes=3)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A cell's checkpoint."""
    path = tmp_path_factory.mktemp("weights") / "best.safetensors"
    recipe = Recipe(image=8, width=8, depth=1, heads=2, mlp=16, device="cpu", engine="eager", precision="fp32")
    about = {
        "arm": "baseline", "seed": 0, "accuracy": 0.5, "data": "digits", "classes": ["a", "b", "c"], "mean": [0.5] * 3,
        "std": [0.2] * 3, "config": vars(CONFIG), "recipe": vars(recipe),
    }  # fmt: skip
    checkpoints.save(path, vit.init(CONFIG, 0), about)
    return path


def loads(path):
    """Whether both readers take the file; they may refuse it in one line."""
    taken = []
    for load in (evaluation.load, lambda path: pretrained.load.__wrapped__(str(path))):
        taken.append(False)
        with refusable():
            found = load(path)
            assert all(p.isfinite().all() and p.is_floating_point() for p in found.params.values())
            taken[-1] = True
    return taken


def test_the_checkpoint_is_taken(weights):
    assert loads(weights) == [True, True]


@given(at=st.integers(0, 1 << 20), bit=st.integers(0, 7), cut=st.booleans())
@tries(150)
def test_a_damaged_checkpoint_is_refused(tried, weights, at, bit, cut):
    content, other = weights.read_bytes(), weights.with_name("other.safetensors")
    at %= len(content)
    other.write_bytes(content[:at] if cut else content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :])
    with refusable():
        params, _ = checkpoints.load(other)
        intact, _ = checkpoints.load(weights)
        assert all(torch.equal(params[name], intact[name]) for name in intact)  # a blank of the header
    loads(other)
    tried["damaged checkpoints"] += 1


HEADERS = [
    "{", "null", "[]", "[" * 10_000, '{"a":' * 10_000, '"x"', "1", "{}", '{"config": null}', '{"config": {"heads": 0}}',
    '{"config": {"heads": "2"}}', '{"config": {"eps": NaN}}', '{"mean": 3}', '{"mean": [1]}', '{"std": [0, 0, 0]}',
    '{"mean": [1e999, 0, 0]}', '{"config": {"heads": 99999999999999999999}}',
]  # fmt: skip


@given(header=st.sampled_from(HEADERS) | JSON.map(json.dumps))
@tries(60)
def test_a_hostile_header_is_one_message(tried, weights, header):
    import safetensors.torch

    other = weights.with_name("header.safetensors")
    other.write_bytes(safetensors.torch.save(vit.init(CONFIG, 0), {"about": header}))
    assert not loads(other)[0]
    tried["headers of checkpoints"] += 1


@given(data=st.data())
@tries(100)
def test_a_forged_description_is_refused_or_evaluated(tried, weights, data):
    params, about = checkpoints.load(weights)
    inner = data.draw(st.sampled_from([about, about["config"], about["recipe"]]))
    inner[data.draw(st.sampled_from(sorted(inner)))] = data.draw(JSON | st.sampled_from([0, -1, 10**7, 10**30]))
    other = weights.with_name("about.safetensors")
    checkpoints.save(other, params, about)
    loads(other)
    tried["forged descriptions of checkpoints"] += 1


@pytest.mark.parametrize(
    "change",
    [
        {"head.bias": torch.full((3,), torch.nan)},
        {"head.weight": torch.ones(3, 8, dtype=torch.int64)},
        {"cls_token": torch.zeros(())},
        {"cls_token": torch.zeros(0, 0, 0)},
        {"patch_embed.proj.weight": torch.zeros(8)},
        {"pos_embed": torch.zeros(1, 4, 8)},
        {"blocks.x.norm1.weight": torch.zeros(8)},
        {"blocks.999999999.norm1.weight": torch.zeros(8)},
        {"blocks.0.attn.q.weight": torch.zeros(8, 8)},
        {"blocks.0.mlp.fc1.weight": torch.zeros(16)},
    ],
)
def test_weights_that_are_none_are_refused(tried, weights, change):
    params, about = checkpoints.load(weights)
    other = weights.with_name("none.safetensors")
    checkpoints.save(other, params | change, about)
    assert not loads(other)[0]
    tried["weights that are none"] += 1


def test_a_pickle_is_not_loaded(tried, weights):
    """Neither as weights nor as a cell's file."""
    other = weights.with_name("pickle.safetensors")
    torch.save({"a": torch.zeros(1)}, other)
    assert loads(other) == [False, False]
    tried["weights that are none"] += 1


@pytest.mark.parametrize(("kind", "shape"), [("F4", [8]), ("F32", [1] * 100)])
def test_what_torch_does_not_compute_with(tried, weights, kind, shape):
    other = weights.with_name("odd.safetensors")
    header = json.dumps({"cls_token": {"dtype": kind, "shape": shape, "data_offsets": [0, 4]}}).encode()
    other.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert loads(other) == [False, False]
    tried["weights that are none"] += 1


def test_a_header_that_claims_more_than_there_is(tried, weights):
    other = weights.with_name("claims.safetensors")
    for length in (0, 1, 2**20, 2**40, 2**63, 2**64 - 1):
        other.write_bytes(struct.pack("<Q", length) + b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}')
        assert loads(other) == [False, False]
        tried["weights that are none"] += 1
