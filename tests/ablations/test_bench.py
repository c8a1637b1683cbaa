from dataclasses import replace

import pytest
import torch

from ablations import bench, bench_tokens
from core import vit

TINY = bench.Bench(image=8, patch=4, width=16, depth=1, heads=2, mlp=32, batch_size=4, steps=1, rounds=2)


def test_every_contender_trains_the_same_shapes():
    config = vit.VitConfig(8, 4, 16, 1, 2, 32, 10)
    batch = torch.randn(4, 3, 8, 8), torch.arange(4)
    for name in bench.PEERS:
        one = bench.peer(name, TINY, config, batch)
        model = one.__closure__[list(one.__code__.co_freevars).index("model")].cell_contents
        assert sum(p.numel() for p in model.parameters()) == vit.parameters(config)


def test_figures_of_every_contender():
    figures = bench.compare(TINY)
    assert set(figures) == {"timm", "torchvision", "baseline, eager", "flash, eager"}
    assert figures["timm"]["ratio"] == 1
    for f in figures.values():
        assert 0 < f["lower_quartile"] <= f["images_per_second"] <= f["upper_quartile"]


def test_blocks_are_interleaved():
    calls = []
    contenders = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    seconds = bench.measure(contenders, steps=2, rounds=3, device=torch.device("cpu"))
    assert "".join(calls) == "aabb" + "aabb" * 3
    assert [len(s) for s in seconds.values()] == [3, 3]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"device": "cudda"}, "unknown device 'cudda'"),
        ({"precision": "fp16"}, "unknown precision 'fp16'"),
        ({"engines": "eagre"}, "unknown engine 'eagre'"),
        ({"rounds": 1}, "at least 2 rounds"),
    ],
)
def test_bad_options_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        bench.check(replace(TINY, **option))


def test_unknown_peer_is_refused():
    with pytest.raises(ValueError, match="unknown peer 'tim'.*did you mean 'timm'"):
        bench.compare(replace(TINY, peers="tim"))


def test_the_transcription_gives_the_same_patches():
    """The peer that the tokenizer is timed against does the same work."""
    images = torch.randn(2, 3, 256, 256)
    ours, theirs = bench_tokens.tokenizer(images), bench_tokens.transcription(images)
    for a, b in zip(ours, theirs, strict=True):
        assert {tuple(row) for row in a[:, :3].round(decimals=3).tolist()} == {
            tuple(row) for row in b[:, :3].round(decimals=3).tolist()
        }
