"""The best model of a cell, reloaded from its checkpoint by the command."""

import re

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.func import functional_call

from ablations import evaluate
from ablations.commands.main import main
from ablations.study import reading, running
from ablations.study.recipes import Recipe
from core.data import sets as data
from core.weights import checkpoints as weights

TINY = "--preset quick --device cpu --image 8 --width 16 --depth 1 --heads 2 --mlp 32 --epochs 2 --batch-size 128"
TINY += " --seeds 1"
ARMS = "baseline,decatt+mrt,crs@0.5+flash"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluate") / "study"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["run.py", "--out", str(out), "--arms", ARMS, *TINY.split()])
        with pytest.raises(SystemExit) as stop:
            main()
    assert stop.value.code == 0
    return out


def call(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
    evaluate.main()


@pytest.mark.parametrize("arm", ARMS.split(","))
def test_the_best_weights_give_their_accuracy_again(study, arm, monkeypatch, capsys):
    (result,) = (r for r in reading.results(study) if r["arm"] == arm)
    call(monkeypatch, study / "cells" / arm / "seed0")
    again, recorded = map(float, re.findall(r"([\d.]+) %", capsys.readouterr().out))
    assert again == recorded == round(100 * result["best_val_accuracy"], 2)


def test_the_checkpoint_is_timms_model(study):
    """Independent of this project's forward pass, preparation and evaluation."""
    params, _ = weights.load(study / "cells" / "baseline" / "seed0" / "best.safetensors")
    model = VisionTransformer(img_size=8, patch_size=4, num_classes=10, embed_dim=16, depth=1, num_heads=2, mlp_ratio=2)
    digits = data.load("digits", "data", 8)
    pixels = digits.train.images.double() / 255
    centred = (digits.val.images.double() / 255 - pixels.mean((0, 2, 3))[:, None, None]) / pixels.std(
        (0, 2, 3), correction=0
    )[:, None, None]
    correct = functional_call(model.eval(), params, centred.float()).argmax(-1) == digits.val.labels
    (result,) = (r for r in reading.results(study) if r["arm"] == "baseline")
    assert correct.double().mean().item() == result["best_val_accuracy"]


def test_correctness_of_every_image_is_kept(study):
    for result in reading.results(study):
        table = np.load(study / "cells" / result["arm"] / "seed0" / "correct.npz")["correct"]
        rows = reading.history(study, result)
        assert table.shape == (2, 360)
        assert table.mean(1).tolist() == [row["val/accuracy"] for row in rows]


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        (["{study}/nowhere"], "checkpoint '{study}/nowhere' does not exist"),
        (["{study}/cells/baseline/seed0", "--data", "folder:{images}"], "tells 10 classes apart (0, 1, 2, …), "),
        (["{study}/other.safetensors"], "is not a checkpoint of a study of this version"),
        (["{study}/broken.safetensors"], "head.weight has shape (7, 16), the model needs (10, 16)"),
        (["{study}/cells/baseline/seed0", "--device", "tpu"], "unknown device 'tpu'"),
    ],
)
def test_bad_input_is_one_message(study, image_folder, monkeypatch, capsys, what, expected):
    params, about = weights.load(study / "cells" / "baseline" / "seed0" / "best.safetensors")
    weights.save(study / "other.safetensors", params, {})
    weights.save(study / "broken.safetensors", params | {"head.weight": torch.zeros(7, 16)}, about)
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, *(word.format(study=study, images=image_folder) for word in what))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert expected.format(study=study) in error
    assert "Traceback" not in error


def test_float32_is_float32_in_both_commands(study, monkeypatch, tmp_path):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    call(monkeypatch, study / "cells" / "baseline" / "seed0")
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    running.prepare("baseline", Recipe(device="cpu"), tmp_path)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
