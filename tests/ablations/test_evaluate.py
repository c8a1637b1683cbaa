"""The best model of a cell, reloaded from its checkpoint by the command."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from commands import call
from timm.models.vision_transformer import VisionTransformer
from torch.func import functional_call

from ablations import evaluate
from ablations.study import reading, running
from ablations.study.about import About
from ablations.study.recipes import Recipe
from core.data import sets as data
from core.weights import checkpoints as weights


@pytest.mark.parametrize("arm", ["baseline", "decatt+mrt", "crs@0.5+flash"])
def test_the_best_weights_give_their_accuracy_again(trained, arm, capsys):
    (result,) = (r for r in reading.results(trained) if r["arm"] == arm)
    assert call(evaluate.main, trained / "cells" / arm / "seed0") == 0
    again, recorded = map(float, re.findall(r"([\d.]+) %", capsys.readouterr().out))
    assert again == recorded == round(100 * result["best_val_accuracy"], 2)


def test_the_checkpoint_is_timms_model(trained):
    """Independent of this project's forward pass, preparation and evaluation."""
    params, _ = weights.load(trained / "cells" / "baseline" / "seed0" / "best.safetensors")
    model = VisionTransformer(img_size=8, patch_size=4, num_classes=10, embed_dim=16, depth=1, num_heads=2, mlp_ratio=2)
    digits = data.load("digits", "data", 8)
    pixels = digits.train.images.double() / 255
    centred = (digits.val.images.double() / 255 - pixels.mean((0, 2, 3))[:, None, None]) / pixels.std(
        (0, 2, 3), correction=0
    )[:, None, None]
    correct = functional_call(model.eval(), params, centred.float()).argmax(-1) == digits.val.labels
    (result,) = (r for r in reading.results(trained) if r["arm"] == "baseline")
    assert correct.double().mean().item() == result["best_val_accuracy"]


def test_images_may_have_many_channels(trained):
    """As those of a plugin's data set."""
    _, about = weights.load(trained / "cells" / "baseline" / "seed0" / "best.safetensors")
    told = json.dumps(about | {"mean": [0.5] * 13, "std": [0.25] * 13})
    assert len(About.model_validate_json(told).std) == 13


def test_correctness_of_every_image_is_kept(trained):
    for cell in reading.read([trained]).cells:
        table = np.load(cell.folder / "correct.npz")["correct"]
        assert table.shape == (2, 360)
        assert table.mean(1).tolist() == [row["val/accuracy"] for row in cell.rows]


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
def test_bad_input_is_one_message(trained, image_folder, capsys, what, expected):
    params, about = weights.load(trained / "cells" / "baseline" / "seed0" / "best.safetensors")
    weights.save(trained / "other.safetensors", params, {})
    weights.save(trained / "broken.safetensors", params | {"head.weight": torch.zeros(7, 16)}, about)
    assert call(evaluate.main, *(word.format(study=trained, images=image_folder) for word in what)) == 2
    error = capsys.readouterr().err
    assert expected.format(study=trained) in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("recipe", "about", "expected"),
    [
        ({"image": None}, {}, "recipe.image: Input should be a valid integer"),
        ({"image": 16}, {}, "says that its model has image 8, and by the recipe 16: it is damaged"),
        ({"depth": 2}, {}, "depth 1, and by the recipe 2"),
        ({}, {"classes": ["a"] * 9}, "classes 10, and by the recipe 9"),
        ({}, {"mean": [0.5]}, "1 means and 3 deviations of channels"),
        ({"set": ["rubbish"]}, {}, "cannot read setting 'rubbish'; write NAME.PARAMETER=VALUE"),
        ({"heads": 7}, {}, "heads 7 do not divide width 16"),
        ({"precision": "fp8"}, {}, "unknown precision 'fp8'"),
    ],
)
def test_a_checkpoint_is_what_its_recipe_makes(trained, capsys, recipe, about, expected):
    params, own = weights.load(trained / "cells" / "baseline" / "seed0" / "best.safetensors")
    weights.save(trained / "forged.safetensors", params, own | about | {"recipe": own["recipe"] | recipe})
    assert call(evaluate.main, trained / "forged.safetensors") == 2
    error = capsys.readouterr().err
    assert expected in error
    assert f"'{trained / 'forged.safetensors'}'" in error
    assert len(error.splitlines()) == 1


def test_data_that_changed_since_are_told(trained, capsys):
    params, own = weights.load(trained / "cells" / "baseline" / "seed0" / "best.safetensors")
    for name, of in (("same", own["identity"]["data"]), ("other", "0" * 64)):
        weights.save(trained / f"{name}.safetensors", params, own | {"identity": own["identity"] | {"data": of}})
        assert call(evaluate.main, trained / f"{name}.safetensors") == 0
        assert (", whose images or labels were others then)" in capsys.readouterr().out) == (name == "other")


def test_the_checkpoint_of_another_cell_is_refused(trained, tmp_path, capsys):
    moved = shutil.copytree(trained / "cells" / "baseline" / "seed0", tmp_path / "cells" / "baseline" / "seed1")
    assert call(evaluate.main, moved) == 2
    assert "best.safetensors' is of another cell (baseline/seed0)" in capsys.readouterr().err
    assert call(evaluate.main, moved / "best.safetensors") == 0


def test_float32_is_float32_in_both_commands(trained, tmp_path):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    assert call(evaluate.main, trained / "cells" / "baseline" / "seed0") == 0
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    running.prepare("baseline", Recipe(device="cpu"), tmp_path)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
