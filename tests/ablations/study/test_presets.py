from dataclasses import replace

import pytest
import torch

from ablations.study import running
from ablations.study.arms import parse, read_settings
from ablations.study.presets import PRESETS, SEEDS
from core import rng
from core.data.augment import preparation
from core.data.splits import Data, Split
from core.errors import InputError
from core.layers import EXACT
from core.model import parameters
from core.optimizers import Averaged
from core.step import objective
from core.targets import Targets


def cifar_like(classes=10, count=300):
    images = torch.zeros(count, 3, 32, 32, dtype=torch.uint8)
    split = Split(images, torch.zeros(count, dtype=torch.int64))
    return Data("x", split, split, tuple(map(str, range(classes))), (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    ("preset", "arm", "classes", "expected"),
    [
        ("published", "baseline", 10, 11_965_642),
        ("published", "flash", 10, 4_197_994),
        ("published", "baseline", 100, 11_983_012),
        ("published", "decatt", 100, 4_206_724),
        ("matched", "baseline", 10, 4_197_994),
        ("matched", "flash", 10, 4_197_994),
        ("finetune", "crs@0.5", 1000, 86_567_656),  # torchvision's vit_b_16 as its documentation counts it
        ("published", "mrt", 10, 4_714_506 - 341_792),  # without the scorer
    ],
)
def test_parameter_counts(preset, arm, classes, expected):
    recipe = PRESETS[preset]
    settings = read_settings([s for s in recipe.set if "scorer" not in s])  # its scorer's weights are not here
    data = cifar_like(classes) if recipe.image is None else replace_side(cifar_like(classes), recipe.image)
    assert parameters(recipe.config(parse(arm, settings), data)) == expected


def test_quick_is_small():
    recipe = PRESETS["quick"]
    assert parameters(recipe.config(parse("baseline"), replace_side(cifar_like(), 16))) == 27_946
    assert (SEEDS["quick"], recipe.set) == (5, ())


def test_published_terms():
    recipe = PRESETS["published"]
    model = recipe.config(parse("flash"), cifar_like())
    assert (model.depth, model.mlp, model.dropout, model.patch, model.head) == (12, 512, 0.1, 4, "mlp")
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate, recipe.weight_decay) == (50, 256, 1e-3, 1e-3)
    assert (recipe.flip, recipe.rotate, recipe.shift, recipe.decay_all) == (True, 15.0, 0, True)
    assert recipe.optimizer(195).rate(torch.tensor(5000)).item() == 1e-3


def test_matched_warms_up_and_decays_to_zero():
    optimizer = PRESETS["matched"].optimizer(steps_per_epoch=195)
    rates = [optimizer.rate(torch.tensor(s)).item() for s in (0, 974, 975, 50 * 195 - 1)]
    assert rates == pytest.approx([1e-3 / 975, 1e-3, 1e-3, 0], abs=1e-7)


def test_fine_tuning_is_study_2_of_what_pretraining_makes():
    recipe, first = PRESETS["finetune"], PRESETS["pretrain"]
    assert (recipe.epochs, recipe.batch_size, recipe.image, recipe.precision) == (8, 64, 224, "fp32")
    model = recipe.config(parse("baseline"), replace_side(cifar_like(), 224))
    assert (model.width, model.depth, model.heads, model.mlp, model.patch, model.dropout) == (768, 12, 12, 3072, 16, 0)
    assert model == first.config(parse("baseline"), replace_side(cifar_like(), 224))


@pytest.mark.parametrize(
    ("side", "patch"), [(8, 4), (16, 4), (24, 4), (28, 4), (32, 4), (56, 4), (64, 8), (96, 8), (100, 10), (224, 16)]
)
def test_the_patch_suits_the_image_unless_it_is_given(side, patch):
    """Every preset on its own data has the patch that it always had."""
    data, recipe = replace(cifar_like(), train=replace_side(cifar_like(32), side).train), PRESETS["quick"]
    given = replace(recipe, batch_size=1, patch=2)
    assert recipe.config(parse("baseline"), data).patch == patch == replace(given, patch=None).resolve_data(data).patch
    assert given.config(parse("baseline"), data).patch == given.resolve_data(data).patch == 2


def test_a_cell_trains_by_the_recipes_terms(tmp_path):
    terms = {"crop": 0.3, "mixup": 0.8, "smoothing": 0.1, "ema": 0.9, "ema_warmup": True}
    recipe = replace(PRESETS["quick"], device="cpu", engine="eager", depth=1, rotate=0.0, **terms)
    (cell,) = running.prepare("baseline", recipe, tmp_path).cells
    state, batch = cell.start(0, rng.key(0)), cell.batch(8)
    _, metrics = cell.step(state, batch)
    prepare = preparation(cell.data.mean, cell.data.std, crop=0.3)
    loss = objective(cell.config, EXACT, prepare, targets=Targets(0.8, 0.1))
    assert metrics.loss == loss(state.params, batch, rng.fold_in(rng.key(0), 0))[0]
    assert cell.optimizer == Averaged(recipe.optimizer(44).inner, 0.9, warmup=True)


def replace_side(data, side):
    images = torch.zeros(1, 3, side, side, dtype=torch.uint8)
    return replace(data, train=Split(images, torch.zeros(1, dtype=torch.int64)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs 0 is outside 1 to 1,000,000"),
        ({"batch_size": 301}, "batch size 301 does not fit the 300 training images: 1 to 300"),
        ({"warmup": 1.0}, "warm-up 1.0 is outside"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        replace(PRESETS["quick"], **change).resolve_data(cifar_like())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "gpu"}, "unknown device 'gpu'; legal: auto, cpu, cuda"),
        ({"precision": "fp23"}, "unknown precision 'fp23'.*did you mean 'fp32'"),
        ({"engine": "eagre"}, "unknown engine 'eagre'.*did you mean 'eager'"),
    ],
)
def test_unknown_machine_settings_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        replace(PRESETS["quick"], **change).resolve_machine()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_cuda_without_a_device_is_refused():
    with pytest.raises(InputError, match="device 'cuda' is not available here: pass --device cpu"):
        replace(PRESETS["quick"], device="cuda").resolve_machine()
