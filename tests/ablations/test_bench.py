import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ablations import bench
from ablations.benchmarks import comparing, training
from core import sizes, vit
from core.errors import InputError

CONFIG = vit.VitConfig(8, 4, 16, 1, 2, 32, 10)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"device": "cudda"}, "unknown device 'cudda'"),
        ({"what": "trane"}, "unknown comparison 'trane'; legal: train, data, tokens; did you mean 'train'"),
        ({"precision": "fp16"}, "unknown precision 'fp16'"),
        ({"shapes": "B32"}, "unknown shape 'B32'; legal: quick, 4.2M"),
        ({"engines": "eagre"}, "unknown engine 'eagre'"),
        ({"engines": "auto"}, "unknown engine 'auto'; legal: eager, compiled, graphed"),
        ({"engines": "graphed"}, "graphed.*needs --device cuda"),
        ({"peers": "tim"}, "unknown peer 'tim'.*did you mean 'timm'"),
        ({"peers": "none:compiled"}, "unknown peer 'none:compiled'"),
        ({"arms": "flush"}, "flush"),
        ({"rounds": 1}, "rounds 1 is outside 2 to 1,000"),
        ({"steps": 10**12}, "steps 1000000000000 is outside 0 to 1,000"),
        ({"batch_size": -1}, "batch size -1 is outside 0 to 1,048,576"),
        ({"batch_size": 10**12}, "batch size 1000000000000 is outside"),
        ({"image": 0}, "image 0 is outside 1 to 16,384"),
        ({"image": 64}, "--image 64 is for modules of others"),
        ({"what": "data", "arms": "flash"}, "--arms is for --what train, and this is data; leave it out"),
        ({"what": "tokens", "precision": "fp32,bf16"}, "--what tokens is of one precision, and --precision has"),
        ({"shapes": "timm:test_vit", "peers": "none"}, "--peers is for our own models, and --shapes names others'"),
        ({"json": Path("/dev/null")}, "'/dev/null' is no file in a folder that is there; pass --json FILE.json"),
    ],
)
def test_bad_options_are_refused(option, message):
    with pytest.raises(InputError, match=message):
        comparing.settled(replace(comparing.Bench(), **option))


@pytest.mark.parametrize("what", comparing.WHAT)
def test_a_batch_that_needs_more_memory_than_there_is(monkeypatch, what):
    monkeypatch.setattr(sizes, "memory", lambda device: 2**30)
    settled = comparing.settled(comparing.Bench(what=what, batch_size=2**20))
    message = r"a step of 1,048,576 images needs [0-9,.]{5,} GiB of memory, and this machine has 1.0; pass a smaller"
    with pytest.raises(InputError, match=message):
        comparing.compared(settled, Console(quiet=True))


def test_the_command_prints_a_table_and_writes_json(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(training.SHAPES, "4.2M", (CONFIG, 4))
    out = tmp_path / "bench.json"
    options = "--shapes 4.2M --arms baseline,flash+readout --peers timm --rounds 2 --steps 1 --json"
    monkeypatch.setattr(sys, "argv", ["bench.py", *options.split(), str(out)])
    bench.main()
    assert "baseline, eager (A/A)" in capsys.readouterr().out
    written = json.loads(out.read_text())
    figures = written["figures"]["4.2M"]
    assert list(figures) == ["timm", "baseline, eager", "flash+readout, eager", "baseline, eager (A/A)"]
    assert figures["timm"]["ratio"] == 1
    assert figures["flash+readout, eager"]["ratio"] > 0
    assert figures["flash+readout, eager"]["tokens"] == 1
    assert figures["flash+readout, eager"]["flops"] < figures["baseline, eager"]["flops"] == 1
    assert written["environment"]["torch"] == torch.__version__


def test_a_module_of_others_is_compared_with_itself_in_a_plain_loop(monkeypatch):
    monkeypatch.setattr(training, "show", lambda *a: None)
    options = {"shapes": "timm:test_vit", "image": 32, "batch_size": 2, "rounds": 2, "steps": 1}
    figures = comparing.compared(comparing.settled(comparing.Bench(**options)), Console(quiet=True))
    ((name, of),) = figures.items()
    assert name == "timm:test_vit, eager"
    assert list(of) == ["plain loop", "baseline, eager", "baseline, eager (A/A)"]
    assert all(figure["ratio"] > 0 and figure["mfu"] > 0 for figure in of.values())


def test_what_arms_save_beside_what_was_foretold(monkeypatch):
    """Without peers the first arm is what ratios refer to; the account's peaks are the measured ones."""
    config = vit.VitConfig(8, 4, 96, 2, 2, 384, 10)  # a step in which the images, here float, are little
    monkeypatch.setitem(training.SHAPES, "quick", (config, 32))
    arms = "patchdrop@0.5,tome@1,checkpointing"
    settled = comparing.settled(comparing.Bench(shapes="quick", peers="none", arms=arms, rounds=2, steps=1))
    figures = comparing.compared(settled, Console(quiet=True))["quick"]
    names = ("patchdrop@0.5, eager", "tome@1, eager", "checkpointing, eager")
    assert [figures[name]["tokens"] for name in names] == [3, 3, 5]
    assert figures[names[0]]["ratio"] == 1
    for name in names:
        assert figures[name]["predicted_bytes"] == pytest.approx(figures[name]["peak_bytes"], rel=0.03), name


def test_without_options_a_cpu_compares_two_shapes_and_readout():
    settled = comparing.settled(comparing.Bench())
    assert settled.shapes == "4.2M,quick"
    assert {"readout", "flash+readout"} <= set(settled.arms.split(","))


def test_figures_of_two_precisions_have_both_names(monkeypatch):
    monkeypatch.setattr(training, "compare", lambda *a: {"timm": {"error": "not run"}})
    settled = comparing.settled(comparing.Bench(shapes="quick", precision="fp32,bf16"))
    assert list(comparing.compared(settled, Console(quiet=True))) == ["quick, fp32", "quick, bf16"]
