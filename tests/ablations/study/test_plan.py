import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ablations.commands.main import main
from ablations.study import arms, plan, running
from ablations.study.presets import PRESETS
from core.data import sets as data
from core.model import parameters


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*options) -> what the command prints and its exit status."""

    def call(*options, plan=("--plan",)):
        monkeypatch.setattr(sys, "argv", ["run.py", "--preset", "quick", *plan, *options])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return SimpleNamespace(stdout=out, stderr=err, returncode=code)

    return call


@pytest.mark.parametrize(("slope", "offset", "start"), [(7, 100, 32), (3, 0, 1), (1000, 5, 64), (5000, 0, 8)])
def test_largest_batch(slope, offset, start):
    """Also where the growth has steps, as k = floor(ratio n) has."""
    for budget in (50, 107, 999, 4000, 123_456):
        for step in (1, 5):
            asked = []

            def peak(batch, step=step, asked=asked):
                asked.append(batch)
                return offset + slope * (batch // step * step + 0.1 * batch)

            expected = max((b for b in range(1, 60_000) if peak(b) <= budget), default=0)
            asked.clear()
            assert plan.largest(peak, budget, start) == expected
            assert len(asked) < 60


def test_largest_batch_beside_a_constant_need():
    """As the evaluation is."""
    assert plan.largest(lambda batch: 100 + max(500, 7 * batch), 1500, 4) == 200
    assert plan.largest(lambda batch: 100 + max(500, 7 * batch), 599, 4) == 0


def test_needs_are_the_parts_of_what_is_held():
    """ViT-B/16 at batch 64 on a GPU, by hand."""
    recipe = replace(PRESETS["finetune"], device="cuda", weights=None)
    (cell,) = running.foresee("baseline", recipe, "data", present=False).cells
    needs, step = plan.needs(cell, 64, 2**36), cell.account(64)
    params = 4 * parameters(cell.config)
    assert needs["data_bytes"] == 60_000 * (3 * 224 * 224 + 8) - 60_000 * 8
    assert plan.needs(cell, 64, 10**10)["data_bytes"] == 0  # more than half of it: not resident
    assert needs["copies_bytes"] == pytest.approx(2 * 3 * params, abs=100)
    assert needs["best_bytes"] == pytest.approx(params, abs=100)
    assert needs["evaluation_bytes"] > 500 * 3 * 224 * 224 * 5  # as stored, and as float32
    parts = [needs[f"{name}_bytes"] for name in ("data", "copies", "best", "evaluation", "workspace", "reserve")]
    assert needs["needed_bytes"] == step.peak_bytes + sum(parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_plan_for_a_gpu_that_is_not_here(run):
    tiny = ("--device", "cuda", "--preset", "quick", "--depth", "1", "--width", "16", "--mlp", "32")
    (entry,) = json.loads(run("--json", "--arms", "flash", *tiny).stdout)
    assert entry["reserve_bytes"] > plan.CONTEXT
    out = run("--arms", "flash", "--precision", "fp32", *tiny)
    assert out.returncode == 2
    assert "arm 'flash': flash on CUDA takes bfloat16 or float16, not float32" in out.stderr
    assert run("--arms", "flash@tiled", "--precision", "fp32", *tiny).returncode == 0


def test_no_batch_is_too_large_for_an_endless_budget():
    assert plan.largest(lambda batch: 1000 + batch, 10**18, 32) == 2**20


def test_json_for_every_arm_without_data(run, tmp_path):
    """CIFAR-10 is not at hand here, and is not needed."""
    out = run("--json", "--data", "cifar10", "--data-root", str(tmp_path), "--arms", "baseline,flash,crs@0.3+mrt")
    planned = json.loads(out.stdout)
    assert [e["arm"] for e in planned] == ["baseline", "flash", "crs@0.3+mrt"]
    needed = {"arm", "parameters", "flops_per_image", "kept_bytes", "kept_bytes_per_block", "peak_bytes"}
    assert all(needed <= e.keys() and "fits" not in e for e in planned)
    known = data.outline("cifar10", image=PRESETS["quick"].image)
    recipe = PRESETS["quick"].resolve_machine().resolve_data(known)
    assert planned[0]["parameters"] == parameters(recipe.config(arms.parse("baseline"), known))
    assert planned[1]["kept_bytes"] < planned[0]["kept_bytes"]
    assert list(tmp_path.iterdir()) == []


def test_the_table_and_the_budget(run):
    """The evaluation needs the same of all: a batch that no arm has room for beside it fits none."""
    shape = ("--image", "24", "--width", "64", "--depth", "2", "--mlp", "256", "--batch-size", "64")
    arms = "baseline,flash,crs@0.3+flash"

    def rows(budget, arms):
        out = run("--arms", arms, *shape, "--budget", budget)
        assert out.returncode == 0
        return {line.split()[0]: line.split()[-2:] for line in out.stdout.splitlines() if line.strip()[-1:].isdigit()}

    planned = {e["arm"]: e for e in json.loads(run("--json", "--arms", arms, *shape).stdout)}
    plain, flash, sampled = (planned[arm]["needed_bytes"] for arm in arms.split(","))
    assert sampled < flash < plain
    found = rows(f"{flash / 2**20:.3f}MiB", arms)
    assert (found["baseline"][0], found["crs@0.3+flash"][0]) == ("no", "yes")
    assert 0 < int(found["baseline"][1]) < 64 < int(found["crs@0.3+flash"][1])
    assert rows("16MiB", "flash")["flash"] == ["no", "0"]


def test_compiled_bytes_are_added_on_demand(run):
    options = ("--arms", "flash", "--depth", "2", "--width", "16", "--mlp", "32", "--batch-size", "4")
    assert json.loads(run("--json", "--engine", "compiled", *options).stdout)[0]["kept_bytes_compiled"] > 0


def test_what_is_done_to_the_images_is_told(run):
    options = ("--image", "64", "--crop", "0.08", "--mixup", "0.8", "--smoothing", "0.1", "--ema", "0.9998")
    told = " ".join(run("--arms", "baseline", "--depth", "1", *options).stdout.split())
    assert "32 images of 64 pixels (patch 8, crop 0.08, mixup 0.8, smoothing 0.1, ema 0.9998) on cpu" in told


def test_outline_is_the_data_without_images():
    known, loaded = data.outline("digits"), data.load("digits")
    assert (known.image, len(known.classes), known.mirrors) == (loaded.image, len(loaded.classes), loaded.mirrors)
    assert known.train.images.shape[1:] == loaded.train.images.shape[1:]
    assert [len(data.outline(name).classes) for name in ("cifar10", "cifar100", "cifar100-coarse")] == [10, 100, 20]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget", "much"), "budget 'much' is no size; write a number and a unit, such as 24GiB"),
        (("--arms", "crs@2"), "crs ratio 2.0 is outside (0, 1]"),
        (
            ("--arms", "crs@0.3+flash", "--set", "crs.scope=published"),
            "arm 'crs@0.3+flash': crs and flash both replace the model's attend",
        ),
        (("--data", "folder:/nowhere"), "/nowhere"),
        (("--patch", "0"), "patch 0 is too small: at least 1"),
        (("--image", "-8"), "image -8 is outside 1 to 16,384"),
        (("--image", "0"), "image 0 is outside 1"),
        (("--arms", "crs@abc"), "crs ratio 'abc' is not a number; write crs@0.5"),
        (("--arms", "FLASH"), "did you mean 'flash'"),
    ],
)
def test_bad_input(run, options, message):
    out = run(*options)
    assert out.returncode == 2
    assert message in out.stderr
    assert "Traceback" not in out.stderr


def test_a_plan_profiles_nothing(run):
    out = run("--profile", "--arms", "flash")
    assert out.returncode == 2
    assert "--profile belongs to a run" in out.stderr


def test_json_and_budget_need_plan(run):
    for option in (("--json",), ("--budget", "1GB")):
        out = run(*option, plan=())
        assert out.returncode == 2
        assert f"{option[0]} belongs to --plan" in out.stderr
