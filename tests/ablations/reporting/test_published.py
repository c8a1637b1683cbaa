"""The published figures, and ours beside them."""

import json
import re
from dataclasses import asdict, replace

import pytest

from ablations.reporting import published
from ablations.study.arms import FINETUNE, PUBLISHED
from ablations.study.presets import PRESETS

MACHINE = {"device_name": "Some GPU", "torch": "2.15"}


def configuration(preset, **changes):
    """As study.json has it once device, image and tokens are decided."""
    recipe = PRESETS[preset]
    equal = ("uniform.patch=4", "mrt.tokens=64", "mrt.min_patch=2", "mrt.max_patch=8")
    recipe = replace(recipe, device="cuda", engine="graphed", precision="bf16", image=recipe.image or 32, flip=True)
    return json.loads(
        json.dumps({"preset": preset, **asdict(replace(recipe, set=(*equal, *recipe.set))), **changes})
    )  # fmt: skip


def result(arm, seconds, accuracy, peak=10_000_000_000, epochs=50, seed=0):
    return {
        "arm": arm, "seed": seed, "parameters": 4_197_994, "train_seconds": seconds, "best_val_accuracy": accuracy,
        "peak_bytes": peak, "epochs": epochs,
    }  # fmt: skip


def rows(lines, first):
    """The cells of the rows whose first or second cell is `first`."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in cells if first in row[:2]]


def test_every_published_arm_is_there():
    assert tuple(row["arm"] for row in published.STUDY_1["arms"]) == PUBLISHED
    assert tuple(row["arm"] for row in published.STUDY_2["arms"]) == FINETUNE
    assert published.beside(configuration("quick"), MACHINE, []) == []


@pytest.mark.parametrize("preset", ["published", "matched", "finetune"])
@pytest.mark.parametrize("data", ["folder:photos", "folder:cifar100@coarse", "digits"])
def test_other_data_has_no_published_figures(preset, data):
    assert published.beside(configuration(preset, data=data), MACHINE, []) == []


@pytest.mark.parametrize("row", published.STUDY_1["arms"], ids=lambda row: row["arm"])
def test_published_multiples_follow_from_the_times(row):
    for data in ("cifar10", "cifar100"):
        (whole, _), (text, _) = published.STUDY_1["arms"][0][data], row.get(data, ("", ""))
        if found := re.fullmatch(r"([\d.]+) min = ([\d.]+) T", text):
            share = float(found[1]) / float(re.findall(r"[\d.]+", whole)[0])
            assert share == pytest.approx(float(found[2]), abs=0.011)


def test_published_memory_ratios_follow_from_the_sizes():
    arms = {row["arm"]: row for row in published.STUDY_2["arms"]}
    for data in published.DATA:
        whole = float(arms["baseline"][data][1].split()[0])
        for arm in ("crs@0.5", "crs@0.3"):
            size, ratio = re.fullmatch(r"([\d.]+) GB \(([\d.]+)x\)", arms[arm][data][1]).groups()
            assert float(ratio) == pytest.approx(whole / float(size), abs=0.06)


def test_study_1():
    finished = [
        result("baseline", 100, 0.8), result("baseline", 102, 0.82, seed=1), result("flash", 50.5, 0.8),
        {"arm": "mrt", "seed": 0, "error": "no"},
    ]  # fmt: skip
    lines = published.beside(configuration("published", data="cifar100"), MACHINE, finished)
    (baseline,), (flash,), (mrt,), (both,) = (rows(lines, n) for n in ("baseline", "Flash", "MRT", "MRT + Flash"))
    assert baseline[2:5] == ["N = 11.9 M", "T = 30.5 min", "45.72 %"]
    assert baseline[5:] == ["4,197,994", "T = 101.0 ± 1.4 s", "81.00 ± 1.41 %", "50"]
    assert flash[3:] == ["20 min = 0.65 T", "50.5 %", "4,197,994", "50.5 s = 0.50 T", "80.00 %", "50"]
    assert mrt[5:] == ["failed"] * 4
    assert both[5:] == ["not run"] * 4
    text = "\n".join(lines)
    assert "SHORT RUN" not in text
    assert "Values, preset" not in text
    assert "Images: " not in text
    assert "`baseline` is a larger model" in text
    assert "The published DeCAtt arm computed something else" in text
    assert "V100 GPUs, PyTorch of 2023; here on Some GPU (cuda), bf16, engine graphed, torch 2.15" in text


def test_terms_that_differ_are_named():
    changes = {"image": 24, "epochs": 2, "batch_size": 64}
    changes["set"] = [*PRESETS["published"].set, "mrt.scorer=blur", "crs.norms=cached"]
    lines = published.beside(configuration("published", **changes), MACHINE, [result("baseline", 240, 0.5, epochs=2)])
    text = "\n".join(lines)
    assert text.count("SHORT RUN: 2 of 50 epochs") == 1
    assert text.count("here, SHORT RUN: ") == 4  # the title of each of our columns
    assert rows(lines, "baseline")[0][3:] == [
        "T = 31 min", "78.39 %", "4,197,994", "T = 4.0 min", "50.00 %", "2",
    ]  # fmt: skip
    assert "Images: published at 32 pixels, here at 24." in text
    assert "epochs 50 -> 2, batch_size 256 -> 64, mrt.scorer features -> blur." in text


def test_matched_has_one_model():
    text = "\n".join(published.beside(configuration("matched"), MACHINE, []))
    assert "all arms are one model" in text
    assert "`baseline` is a larger model" not in text
    assert "baseline_width 384 -> None, baseline_heads 6 -> None, schedule constant -> cosine" in text


@pytest.mark.parametrize(
    ("data", "place", "figures"),
    [
        ("cifar10", 1, ["0.9891", "here", "0.9122", "0.9613"]),
        ("cifar100", 2, ["0.9891", "0.9122", "here", "0.9613"]),
        ("cifar100-coarse", 3, ["0.9891", "0.9122", "0.9613", "here"]),
    ],
)
def test_study_2(data, place, figures):
    finished = [
        result("baseline", 9, 0.99, 16e9, 8),
        result("crs@0.5", 9, 0.98, 8e9, 8),
        result("bf16", 9, 0.9, 4e9, 8),
    ]
    lines = published.beside(configuration("finetune", data=data), MACHINE, finished)
    assert rows(lines, "ratio")[0][1 + place] == "here"
    assert lines[0].startswith(f"Here: {data}.")
    accuracy, memory = rows(lines, "0.5")
    assert accuracy[1:] == [f if "here" not in f else "0.9800" for f in figures]
    assert memory[1 + place] == "8.00 GB (2.0x)"
    assert rows(lines, "1 (exact)")[1][1 + place] == "16.00 GB"
    assert rows(lines, "0.3")[0][1 + place] == "not run"
    assert rows(lines, "1 (control: bf16)")[1].count("—") == 3
    text = "\n".join(lines)
    assert "A40" in text
    assert "not consistent with the stated scope" in text
    assert "precision fp32 -> bf16" in text


def test_other_weights_are_named():
    text = "\n".join(published.beside(configuration("finetune", weights="a.safetensors", epochs=1), MACHINE, []))
    assert "weights torchvision:vit_b_16 -> a.safetensors" in text
    assert "SHORT RUN: 1 of 8 epochs" in text
