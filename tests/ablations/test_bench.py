import json
import sys
from dataclasses import replace

import pytest
import torch

from ablations.benchmarks import data as bench_data
from ablations.benchmarks import peers
from ablations.benchmarks import tokens as bench_tokens
from ablations.benchmarks import training as bench
from core import vit
from core.errors import InputError
from core.measure import tensor_bytes

CPU = torch.device("cpu")
CONFIG = vit.VitConfig(8, 4, 16, 1, 2, 32, 10)
TINY = bench.settled(bench.Bench(batch_size=4, steps=2, rounds=2))


@pytest.mark.parametrize("name", ["timm", "torchvision", "transformers"])
def test_peers_have_the_same_shapes(name):
    model = peers.PEERS[name](CONFIG)
    assert sum(p.numel() for p in model.parameters()) == vit.parameters(CONFIG)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def test_the_published_configuration_has_the_published_size():
    config, _ = bench.SHAPES["4.2M"]
    assert sum(p.numel() for p in peers.published(config).parameters()) == 4_197_994
    config, _ = bench.SHAPES["12M"]
    assert sum(p.numel() for p in peers.published(config).parameters()) == 11_965_642


def test_figures_of_every_contender():
    figures = bench.compare(TINY, CONFIG, 4, "fp32")
    assert set(figures) == {*peers.PEERS, "baseline, eager", "flash, eager", "baseline, eager (A/A)"}
    assert figures["timm"]["ratio"] == 1
    state = 3 * 4 * vit.parameters(CONFIG)
    for f in figures.values():
        assert 0 < f["lower_quartile"] <= f["images_per_second"] <= f["upper_quartile"]
        assert f["peak_bytes"] > state
        assert f["mfu"] > 0
    assert figures["baseline, eager"]["peak_bytes"] == figures["baseline, eager (A/A)"]["peak_bytes"]


def test_a_contender_that_cannot_run_says_why(monkeypatch):
    def refusing(*args):
        raise InputError("flash on CUDA takes bfloat16")

    monkeypatch.setattr(bench, "ours", refusing)
    figures = bench.compare(replace(TINY, peers="timm"), CONFIG, 4, "fp32")
    assert figures["flash, eager"] == {"error": "flash on CUDA takes bfloat16"}
    assert figures["timm"]["ratio"] == 1


def test_a_peers_peak_counts_its_state():
    batch = torch.randn(4, 3, 8, 8), torch.arange(4)
    made = peers.contender("timm", CONFIG, batch, half=False, compiled=False, steps=1)
    made.run()
    floor = 3 * 4 * vit.parameters(CONFIG) + tensor_bytes(batch)
    assert floor < made.peak() < 10 * floor


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"device": "cudda"}, "unknown device 'cudda'"),
        ({"what": "trane"}, "unknown comparison 'trane'; legal: train, data, tokens; did you mean 'train'"),
        ({"precision": "fp16"}, "unknown precision 'fp16'"),
        ({"shapes": "B32"}, "unknown shape 'B32'; legal: 4.2M"),
        ({"engines": "eagre"}, "unknown engine 'eagre'"),
        ({"engines": "auto"}, "unknown engine 'auto'; legal: eager, compiled, graphed"),
        ({"engines": "graphed"}, "graphed.*needs --device cuda"),
        ({"peers": "tim"}, "unknown peer 'tim'.*did you mean 'timm'"),
        ({"arms": "flush"}, "flush"),
        ({"rounds": 1}, "rounds 1, .* at least 2"),
        ({"batch_size": -1}, "batch size -1: at least 2, 0 and 0"),
    ],
)
def test_bad_options_are_refused(option, message):
    with pytest.raises(InputError, match=message):
        bench.settled(replace(bench.Bench(), **option))


def test_the_command_prints_a_table_and_writes_json(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(bench.SHAPES, "4.2M", (CONFIG, 4))
    out = tmp_path / "bench.json"
    arguments = [
        "bench.py",
        "--arms",
        "baseline",
        "--peers",
        "timm",
        "--rounds",
        "2",
        "--steps",
        "1",
        "--json",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    bench.main()
    assert "baseline, eager (A/A)" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["figures"]["4.2M, batch 64, fp32"]["timm"]["ratio"] == 1
    assert written["environment"]["torch"] == torch.__version__


def test_what_data_costs(monkeypatch):
    monkeypatch.setattr(bench_data, "CONFIG", vit.VitConfig(32, 8, 16, 1, 2, 32, 10))
    figures = bench_data.compare(4, 2, CPU, torch.float32)
    assert figures["ready"]["share of throughput lost"] == 0
    assert set(figures) == {
        "ready", "in memory, augmented", "streamed, augmented", "reading alone", "records of an epoch"
    }  # fmt: skip
    assert all(f["seconds"] > 0 for f in figures.values())


def test_the_transcription_gives_the_same_patches():
    """The peer that the tokenizer is timed against does the same work."""
    images = torch.randn(2, 3, 256, 256)
    ours, theirs = bench_tokens.tokenizer(images), bench_tokens.transcription(images)
    for a, b in zip(ours, theirs, strict=True):
        assert {tuple(row) for row in a[:, :3].round(decimals=3).tolist()} == {
            tuple(row) for row in b[:, :3].round(decimals=3).tolist()
        }
