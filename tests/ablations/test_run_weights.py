"""Studies of other images, and of weights that were trained before."""

import json
import shutil

import pytest
import torch
from commands import call, hurry

from ablations.commands.main import main
from ablations.study import arms, cells, evaluation, reading
from core import vit
from core.data import sets as data_sets
from core.weights import checkpoints as weights


def test_image_folders_train(command, image_folder):
    assert command("--arms", "baseline", "--data", f"folder:{image_folder}", "--batch-size", "8", "--epochs", "4") == 0
    (result,) = reading.results(command.out)
    assert result["best_val_accuracy"] == 1.0  # dark against bright
    assert json.loads((command.out / "study.json").read_text())["configuration"]["flip"] is True


SMALL = ["--device", "cpu", "--patch", "4", "--width", "16", "--depth", "2", "--heads", "2", "--mlp", "32"]


@pytest.fixture
def finetune(image_folder, tmp_path, monkeypatch):
    """finetune(checkpoint, *options) -> exit status; the study is runs/finetune-images of tmp_path."""
    hurry(monkeypatch)
    monkeypatch.chdir(tmp_path)
    fixed = ["--data", f"folder:{image_folder}", "--image", "16", "--batch-size", "8", "--epochs", "2", *SMALL]
    return lambda checkpoint, *options: call(main, "--preset", "finetune", "--weights", checkpoint, *fixed, *options)


def test_pretraining_then_fine_tuning(finetune, image_folder, tmp_path, monkeypatch, capsys):
    """Study 2 without a network, at another image size; it starts from the checkpoint, and is evaluated again."""
    options = ["--data", f"folder:{image_folder}", "--image", "8", "--batch-size", "8", "--epochs", "2"]
    assert call(main, "--preset", "pretrain", *SMALL, *options) == 0
    checkpoint = tmp_path / "runs" / "pretrain-images" / "cells" / "baseline" / "seed0" / "best.safetensors"
    started = {}
    start = cells.start
    monkeypatch.setattr(cells, "start", lambda params, *rest: started.update(params) or start(params, *rest))
    assert finetune(checkpoint.parent) == 0  # a cell is as good as its checkpoint
    assert "Against its control recompute:" in capsys.readouterr().out
    out = tmp_path / "runs" / "finetune-images"
    assert {r["arm"] for r in reading.results(out)} == set(arms.FINETUNE)
    params, about = weights.load(checkpoint)
    assert {n for n in params if not torch.equal(started[n], params[n])} == {"pos_embed", "head.weight", "head.bias"}
    (result,) = (r for r in reading.results(out) if r["arm"] == "crs@0.5")
    trained = evaluation.load(out / "cells" / "crs@0.5" / "seed0")
    assert trained.about["mean"] == about["mean"]
    data = data_sets.load(f"folder:{image_folder}", image=16)
    assert evaluation.accuracy(trained, data, torch.device("cpu")).accuracy == result["best_val_accuracy"]
    text = (out / "report" / "report.md").read_text()
    assert "SHORT RUN" not in (out / "report" / "report.md").read_text()  # published figures are of other data
    assert f"weights torchvision:vit_b_16 -> {checkpoint.parent}" in text


@pytest.fixture
def checkpoint(tmp_path):
    config = vit.VitConfig(image=8, patch=4, width=16, depth=2, heads=2, mlp=32, classes=2)
    weights.save(tmp_path / "own.safetensors", vit.init(config, 0), {"config": vars(config)})
    return tmp_path / "own.safetensors"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--width", "32", "--depth", "1"],
            "have width 16, depth 2, the model has width 32, depth 1; pass --width 16 --d",
        ),
        (["--heads", "4", "--patch-norm", "True"], "pass --heads 2 --patch-norm False"),
        (["--baseline-width", "32"], "pass --baseline-width None --baseline-heads None too"),
        (["--arms", "mrt"], "arm 'mrt': its transforms ask for a model of patch 2 (the weights: 4); give them other"),
    ],
)
def test_weights_of_another_shape_are_refused(finetune, checkpoint, capsys, options, expected):
    assert finetune(checkpoint, *options) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert len(error.splitlines()) == 1
    assert not checkpoint.with_name("runs").exists()


def test_mrt_starts_from_weights_of_its_patch(finetune, checkpoint):
    sizes = ["mrt.min_patch=4", "mrt.max_patch=8", "mrt.tokens=10"]
    assert finetune(checkpoint, "--arms", "mrt,uniform", "--epochs", "1", "--set", *sizes) == 0


def test_several_data_sets(image_folder, tmp_path, monkeypatch, capsys):
    """A study each; an unknown one is refused before the first is trained."""
    hurry(monkeypatch)
    monkeypatch.chdir(tmp_path)

    def train(data):
        return call(
            main, "--preset", "quick", "--image", "8", *SMALL, "--arms", "baseline", "--epochs", "1", "--seeds", "1",
            "--batch-size", "8", "--data", data,
        )  # fmt: skip

    assert train(f"folder:{image_folder},digit") == 2
    assert "did you mean 'digits'?" in capsys.readouterr().err
    assert train("digits,digits") == 2
    assert "gives two studies one folder" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    shutil.copytree(image_folder, tmp_path / "others")
    shutil.copy("others/train/dark/0.png", "others/val/dark/0.png")
    assert train(f"folder:{image_folder},folder:others") == 0
    assert "\n1 of the 8 validation images are learned, too" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"quick-images", "quick-others"}
    monkeypatch.setattr(
        "ablations.commands.main.execute", lambda command, console, stop: int(command.recipe.data == "digits")
    )
    assert train("digits,folder:others") == 1
