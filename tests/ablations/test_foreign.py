"""A study of another's model and a package of one's own, by the commands and from Python."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from commands import call, hurry

import ablations
from ablations import evaluate, report
from ablations.commands.main import main
from ablations.study import reading
from core import plugins
from core.data import sets
from core.errors import InputError
from core.transforms.registry import REGISTRY
from core.weights import checkpoints

ROOT = Path(__file__).parents[2]
ARMS = "baseline,crs@0.5,decatt+flash,recompute"
MODEL = """import torch
import torch.nn.functional as F
from torch import nn


class Layer(nn.Module):
    def __init__(self, D):
        super().__init__()
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, N, 3, 2, D // 2).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Net(nn.Module):
    def __init__(self, classes, D=16):
        super().__init__()
        self.embed, self.layers, self.head = nn.Conv2d(3, D, 4, 4), nn.ModuleList([Layer(D)]), nn.Linear(D, classes)
        self.register_buffer("positions", torch.linspace(-1, 1, 4 * D).view(4, D))

    def forward(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def build(classes):
    return Net(classes)
"""


@pytest.fixture(autouse=True)
def short(monkeypatch):
    hurry(monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "mine.py"
    path.write_text(MODEL)
    return f"module:{path}:build"


def options(model, out, arms=ARMS):
    words = f"--preset quick --device cpu --engine eager --image 8 --epochs 1 --batch-size 128 --seeds 1 --arms {arms}"
    return [*words.split(), "--model", model, "--out", out]


def test_a_study_of_four_arms(model, tmp_path, capsys):
    out = tmp_path / "study"
    assert call(main, *options(model, out)) == 0
    said = capsys.readouterr().out
    assert "transforms reach 5 linear maps, 2 LayerNorms and 1 attentions in 1 blocks" in said
    assert sorted(r["arm"] for r in reading.results(out)) == sorted(ARMS.split(","))
    found = ablations.load(out)
    assert set(found.cells["arm"]) == set(ARMS.split(","))
    assert {"crs@0.5", "decatt", "flash"} <= set(found.verdicts["optimization"])
    assert not len(found.failed)
    cell = out / "cells/crs@0.5/seed0"
    params, about = checkpoints.load(cell / "best.safetensors")
    namespace = {}
    exec(MODEL, namespace)
    net = namespace["build"](10)
    net.load_state_dict(params)
    assert call(evaluate.main, cell, "--data-root", tmp_path) == 2
    assert f"is code in a file; pass --model {model} to run it" in capsys.readouterr().err
    assert call(evaluate.main, cell, "--model", model) == 0
    assert f"{100 * about['accuracy']:.2f} % of 360" in capsys.readouterr().out


def test_what_a_model_cannot_take_is_left_out_of_a_group_and_refused_by_name(model, tmp_path, capsys):
    assert call(main, *options(model, tmp_path / "a", "baseline,mrt")) == 2
    error = capsys.readouterr().err
    assert "arm 'mrt': mrt changes the model's tokenize, which is not reached in module:" in error
    assert "leave it out, or use our own model" in error
    assert call(main, *options("timm:vit_tiny_patch16_224", tmp_path / "a", "lora")) == 2
    assert "lora is for pretrained weights; pass --weights, or leave it out (a model" in capsys.readouterr().err
    assert call(main, *options(model, tmp_path / "a"), "--width", "8") == 2
    assert "--width is for our own model, and --model module:" in capsys.readouterr().err
    assert call(main, *options(model, tmp_path / "a", "all"), "--plan", "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert {"baseline", "flash", "crs@0.3+decatt+flash", "recompute"} <= {entry["arm"] for entry in planned}
    assert not any("mrt" in entry["arm"] or "uniform" in entry["arm"] for entry in planned)
    by_arm = {entry["arm"]: entry for entry in planned}
    assert by_arm["recompute"]["kept_bytes"] < by_arm["baseline"]["kept_bytes"]
    assert by_arm["baseline"]["kept_bytes_per_block"] > 0


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The package of tests/plugin is installed; a function that takes it away."""
    shutil.copytree(ROOT / "tests/plugin", tmp_path / "source")
    target = ["--no-deps", "--no-build-isolation", "--quiet", "--target", str(tmp_path / "site")]
    subprocess.run([sys.executable, "-m", "pip", "install", *target, str(tmp_path / "source")], check=True)
    before = dict(REGISTRY)

    def forget():
        monkeypatch.setattr(plugins, "_from", {})
        monkeypatch.setattr(sets, "PLUGGED", {})
        REGISTRY.clear()
        REGISTRY.update(before)

    def uninstall():
        monkeypatch.setattr(sys, "path", [at for at in sys.path if at != str(tmp_path / "site")])
        forget()

    forget()
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield uninstall
    forget()


def test_an_installed_package_appears_and_runs(installed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(main, "--list") == 0
    listed = capsys.readouterr().out
    assert "activity   penalty on large head outputs (changes the objective)" in listed
    assert "plugin:stripes" in listed
    words = "--preset quick --device cpu --engine eager --image 8 --width 16 --depth 1 --heads 2 --mlp 32 --epochs 1"
    words += " --batch-size 32 --seeds 1 --arms baseline,activity@0.1 --data plugin:stripes --out study"
    assert call(main, *words.split()) == 0
    assert {r["arm"] for r in reading.results(tmp_path / "study")} == {"baseline", "activity@0.1"}
    assert call(evaluate.main, "study/cells/activity@0.1/seed0") == 0
    assert call(report.main, "study") == 0
    installed()
    assert call(report.main, "study") == 2
    without = capsys.readouterr().err
    assert "optimization activity is not registered here; pass --plugin FILE, or install" in without


def test_from_python(tmp_path):
    values = {"image": 8, "width": 16, "depth": 1, "heads": 2, "mlp": 32, "epochs": 1, "batch_size": 128}
    study = ablations.run(tmp_path / "study", "baseline,flash", device="cpu", engine="eager", **values)
    assert all(isinstance(table, pd.DataFrame) for table in study)
    assert set(study.means.index) == {"baseline", "flash"}
    assert study.verdicts.equals(ablations.load(tmp_path / "study").verdicts)
    with pytest.raises(InputError, match="unknown recipe value 'epoch'.*did you mean 'epochs'"):
        ablations.run(tmp_path / "other", epoch=1)
    for values, said in (
        ({"epochs": "1"}, "epochs"),
        ({"set": "mrt.scorer=blur"}, r"set='mrt.scorer=blur' is one text; write set=\('mrt.scorer=blur',\)"),
        ({"plugin": "mine.py"}, r"write plugin=\('mine.py',\)"),
        ({"data": None}, "data"),
        ({"seeds": 1.5}, "seeds 1.5 is no whole number"),
        ({"data_root": None}, "data_root None is no path"),
    ):
        with pytest.raises(InputError, match=said):
            ablations.run(tmp_path / "other", **values)


def test_reports_know_files(tmp_path, capsys):
    assert call(report.main, tmp_path, "--plugin", tmp_path / "none.py") == 2
    assert "none.py' does not exist" in capsys.readouterr().err
