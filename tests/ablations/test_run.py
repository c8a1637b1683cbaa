"""The command, end to end on a tiny model: what it writes, and how it continues."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ablations.reporting import compose
from ablations.reporting import figures as drawing
from ablations.study import arms, cells, evaluation, profiling, reading, running, schema, store
from ablations.study.recipes import Recipe
from core import engine
from core.data import sets as data_sets
from core.weights import checkpoints as weights

DRAW = drawing.draw
FIELDS = {
    "arm", "seed", "preset", "data", "parameters", "epochs", "best_val_accuracy", "final_val_accuracy",
    "final_train_loss", "train_seconds", "images_per_second", "step_ms_median", "peak_bytes", "engine", "device",
    "precision", "torch",
}  # fmt: skip
TIMES = {"files", "mfu", "train_seconds", "images_per_second", "step_ms_median", "warmup_seconds"}


@pytest.fixture
def figures(command, monkeypatch):
    """Draws them."""
    monkeypatch.setattr(drawing, "draw", DRAW)


def test_a_study_leaves_what_it_promises(command, figures, capsys):
    chosen = ("baseline", "mrt", "decatt+flash")
    assert command("--arms", ",".join(chosen), "--seeds", "2") == 0
    out = command.out
    results = reading.results(out)
    assert {(r["arm"], r["seed"]) for r in results} == {(arm, seed) for arm in chosen for seed in (0, 1)}
    assert all(set(r) >= FIELDS for r in results)
    for name in ("study.json", "report/results.csv", "report/report.md", "report/figures/learning_curves.png"):
        assert (out / name).stat().st_size > 0
    cell = out / "cells" / "decatt+flash" / "seed1"
    assert len((cell / "metrics.jsonl").read_text().splitlines()) == 2
    assert (cell / "best.safetensors").exists()
    assert len((out / "report" / "results.csv").read_text().splitlines()) == 1 + 3 * 2
    text = (out / "report" / "report.md").read_text()
    assert "| decatt+flash | 2 |" in text
    assert "Means over seeds ± standard deviation" in text
    assert (out / "report" / "report.html").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "peak memory, %" in printed
    assert "time not timed" in printed


def test_arms_differ_by_their_transforms_only(command):
    """flash is exact: same initial weights, order and augmentation give the baseline's training to rounding."""
    assert command("--arms", "baseline,flash,decatt") == 0
    rows = {arm: group[0].rows for arm, group in reading.read([command.out]).arms.items()}
    for ours, theirs in zip(rows["flash"], rows["baseline"], strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)
    assert rows["decatt"][-1]["train/penalty"] > 0
    assert rows["baseline"][-1]["train/penalty"] == 0


def test_the_same_seed_gives_the_same_result(command):
    results = []
    for _ in range(2):
        assert command("--arms", "decatt+flash", "--dropout", "0.1") == 0
        results += reading.results(command.out)
        shutil.rmtree(command.out)
    first, again = ({k: v for k, v in r.items() if k not in TIMES} for r in results)
    assert first == again


def test_finished_cells_are_skipped_and_others_added(command, monkeypatch):
    """A cell is of what it was trained by, whatever others accept while it trains."""
    assert command("--arms", "baseline") == 0
    before = (command.out / "cells" / "baseline" / "seed0" / "result.json").stat().st_mtime_ns
    trained = []
    train = running.train

    def training(cell, *rest):
        trained.append(cell.arm.name)
        study = store.read_study(command.out)
        store.write_json(command.out / "study.json", study | {"identity": study["identity"] | {"code": "e" * 64}})
        return train(cell, *rest)

    monkeypatch.setattr(running, "train", training)
    assert command("--arms", "baseline,flash") == 0
    assert trained == ["flash"]
    first, second = (result["identity"] for result in reading.results(command.out))
    assert first == second == schema.read(command.out / "timing.json", schema.TimingFile)["identity"]
    assert (command.out / "cells" / "baseline" / "seed0" / "result.json").stat().st_mtime_ns == before


def test_exact_arms_are_trained_at_the_first_seed(command, capsys):
    options = ["--arms", "baseline,flash", "--seeds", "2", "--epochs", "1"]
    assert command(*options) == 0
    assert "0 of 3 cells finished before, 3 to run (1 more are known from their twins; " in capsys.readouterr().out
    assert command(*options, "--every-arm") == 0
    assert len(reading.results(command.out)) == 4


@pytest.mark.parametrize(
    ("names", "again"),
    [
        ("baseline,baseline-again,flash,decatt,decatt+flash", {"baseline", "decatt"}),
        ("flash,decatt", {"flash", "decatt"}),  # without its twin an exact arm is trained at every seed
    ],
)
def test_which_arms_a_second_seed_has(names, again):
    study = running.foresee(names, Recipe(device="cpu"), Path("data"))
    assert {cell.arm.name for cell, seed in study.planned(range(2)) if seed == 1} == again
    assert len(study.planned(range(2), every_arm=True)) == 2 * len(names.split(","))


def test_each_seed_holds_out_another_fifth(command, monkeypatch):
    assert command("--arms", "baseline", "--seeds", "3", "--epochs", "1") == 0
    assert [r["held_out"] for r in reading.results(command.out)] == [0, 1, 2]
    result = reading.results(command.out)[2]
    model = evaluation.load(command.out / "cells" / "baseline" / "seed2")
    data = data_sets.load("digits", image=8).holding_out(2)
    assert evaluation.accuracy(model, data, torch.device("cpu")).accuracy == result["best_val_accuracy"]


def test_a_run_is_timed_once_and_again_when_asked(command, capsys):
    assert command("--arms", "baseline,flash") == 0
    path = command.out / "timing.json"
    first = path.read_text()
    assert json.loads(first)["ratios"].keys() == {"baseline", "baseline-again", "flash"}
    assert command("--arms", "baseline,flash", "--seeds", "2") == 0
    assert path.read_text() == first
    assert command("--arms", "baseline,flash,mrt", "--timing-only") == 0
    assert "mrt" in json.loads(path.read_text())["ratios"]
    assert {r["arm"] for r in reading.results(command.out)} == {"baseline", "flash"}
    assert command("--arms", "flash", "--timing-only") == 2
    assert "a timing pass compares with the baseline; add it" in capsys.readouterr().err


def test_until_ends_when_all_is_decided_or_at_the_last_seed():
    trained, clock = [], iter(range(0, 10_000, 30))
    decided = iter([False, False, True])
    one = lambda seed: trained.append(seed) or 1  # noqa: E731
    assert running.until(lambda count: next(decided), range(3, 11), 60, one) == (4, 4, "all is decided")
    assert trained == [3, 4, 5, 6]
    assert running.until(lambda count: False, range(3), 60, one)[0] == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running.time, "monotonic", lambda: next(clock))  # a seed takes half a minute
        count, _, why = running.until(lambda count: False, range(50), 3, one)
    assert 2 <= count <= 4
    assert "longer than 3 minutes" in why


def test_until_is_of_the_studys_verdicts(command, capsys):
    """A margin that nothing can miss is met at the second seed, and the intervals allow for all looks. A seed that an
    earlier run began is finished before another look."""
    options = "--arms", "baseline,decatt", "--seeds", "4", "--until", "accuracy=999", "--margin", "time=5"
    assert command(*options) == 0
    assert {r["seed"] for r in reading.results(command.out)} == {0, 1}
    assert "2 of at most 4 seeds; all is decided" in capsys.readouterr().out
    assert schema.read(command.out / "margins.json", schema.MarginsFile) == {
        "margins": {"accuracy": 0.5, "time": 5.0, "memory": 2.0}, "looks": 3,
    }  # fmt: skip
    (command.out / "cells" / "decatt" / "seed2").mkdir()
    assert command(*options) == 0
    assert "3 of at most 4 seeds; all is decided" in capsys.readouterr().out


def test_a_second_seed_compiles_nothing(command, monkeypatch):
    compiled = []

    def counting(graph, inputs):
        compiled.append(graph)
        return graph

    def compile_(fn):
        return torch.compile(engine.fresh(fn), fullgraph=True, dynamic=False, backend=counting)

    monkeypatch.setattr(engine, "_compile", compile_)
    fast = ["--engine", "compiled", "--epochs", "1"]
    assert command("--arms", "flash,decatt", "--seeds", "2", *fast) == 0  # without a timing pass
    assert len(reading.results(command.out)) == 4
    assert len(compiled) == 2  # the losses of two arms


def test_a_users_files_stay_whatever_arms_are_called(command, monkeypatch):
    """Only cells/ and report/ are the program's."""
    for name in ("report", "figures"):
        monkeypatch.setitem(arms.REGISTRY, name, arms.REGISTRY["decatt"])
    assert command("--arms", "baseline,report", "--epochs", "1") == 0
    kept = [command.out / "notes.txt", command.out / "baseline" / "seed0" / "mine.txt"]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    assert command("--arms", "baseline,report,figures", "--epochs", "1") == 0
    assert {r["arm"] for r in reading.results(command.out)} == {"baseline", "report", "figures"}
    assert all(path.read_text() == "mine" for path in kept)


def test_the_best_weights_are_kept_and_not_the_last(command, monkeypatch):
    seen, evaluate = [], cells.evaluate

    def falling(params, *rest):
        seen.append(params)
        correct = torch.zeros(360, dtype=torch.bool)
        correct[: 100 - len(seen)] = True
        return evaluate(params, *rest)._replace(correct=correct)

    monkeypatch.setattr(cells, "evaluate", falling)
    assert command("--arms", "baseline", "--ema", "0.9999") == 0
    saved, about = weights.load(command.out / "cells" / "baseline" / "seed0" / "best.safetensors")
    assert about["accuracy"] == 99 / 360
    assert all(torch.equal(saved[name], seen[0][name]) for name in saved)
    assert not torch.equal(saved["head.weight"], seen[1]["head.weight"])
    assert (saved["head.weight"] - seen[1]["head.weight"]).abs().max() < 1e-3  # averages: the weights move by far more


def test_mrt_has_the_baselines_token_count(command, figures):
    """Whatever the patch: the comparison stays one of equal compute."""
    assert command("--arms", "mrt", "--image", "32", "--patch", "8", "--epochs", "1") == 0
    settings = json.loads((command.out / "study.json").read_text())["configuration"]["set"]
    assert settings == ["uniform.patch=8", "mrt.tokens=16", "mrt.min_patch=4", "mrt.max_patch=16"]
    assert (command.out / "report" / "figures" / "tokens_mrt.png").stat().st_size > 0


def test_the_loop_of_an_arm_is_given_back(command, monkeypatch):
    """Its graph and its buffers; what is compiled stays for the timing pass."""
    seen = []
    monkeypatch.setattr(cells.Prepared, "release", lambda cell: seen.append(cell.arm.name))
    assert command("--arms", "flash,decatt", "--seeds", "2", "--every-arm") == 0
    assert list(dict.fromkeys(seen)) == ["flash", "decatt"]


def test_report_can_be_rebuilt_from_the_cells(command):
    assert command("--arms", "baseline") == 0
    text = (command.out / "report" / "report.md").read_text()
    for name in ("report.md", "results.csv"):
        (command.out / "report" / name).unlink()
    compose.write([command.out])
    assert (command.out / "report" / "report.md").read_text() == text


def test_published_figures_are_not_shown_for_other_data(command):
    options = ["--preset", "published", "--data", "digits", "--baseline-width", "32", "--baseline-heads", "4"]
    assert command(*options, "--arms", "baseline,decatt", "--epochs", "1") == 0
    text = (command.out / "report" / "report.md").read_text()
    assert "The published" not in text
    assert "epochs 50 -> 1" in text


def test_profiles_are_a_pass_of_their_own(command, monkeypatch, capsys):
    assert command("--arms", "baseline,flash", "--profile") == 0
    for arm in ("baseline", "flash"):
        assert (command.out / "cells" / arm / "profile" / "trace.json.gz").exists()
        folder = command.out / "report" / "profiles" / arm
        assert {"operations.md", "categories.png", "memory.png", "categories.svg", "memory.svg"} == {
            p.name for p in folder.iterdir()
        }
        assert (command.out / "report" / "tensorboard" / arm / "step.pt.trace.json.gz").stat().st_size > 0
    assert "Difference from `baseline`" in (folder.with_name("flash") / "operations.md").read_text()
    before = (command.out / "cells" / "flash" / "profile" / "profile.json").stat().st_mtime_ns
    shutil.rmtree(command.out / "cells" / "baseline" / "profile")

    def failing(*args, **options):
        raise RuntimeError("no profiler")

    monkeypatch.setattr(profiling, "profile", failing)
    assert command("--arms", "baseline,flash", "--profile") == 1
    assert "profile of baseline: failed: RuntimeError: no profiler" in capsys.readouterr().out
    assert "no profiler" in (command.out / "cells" / "baseline" / "profile" / "failed.json").read_text()
    assert (command.out / "cells" / "flash" / "profile" / "profile.json").stat().st_mtime_ns == before
    study = store.read_study(command.out)
    store.write_json(command.out / "study.json", study | {"identity": study["identity"] | {"code": "0" * 64}})
    assert not profiling.finished(command.out / "cells" / "flash" / "profile")  # it would stand beside later code's
    compose.write([command.out])
    assert "flash/profile/profile.json' was made under other" in (command.out / "report" / "report.md").read_text()
    assert not (command.out / "report" / "profiles" / "flash" / "operations.md").exists()
    assert len(reading.results(command.out)) == 2


def test_the_command_runs_the_code_beside_it_installed_or_not(tmp_path):
    for name, text in {
        "run.py": Path(arms.__file__).parents[1].joinpath("run.py").read_text(),
        "__init__.py": "",
        "commands/__init__.py": "",
        "commands/main.py": "def main():\n    print('the code beside it')",
    }.items():
        path = tmp_path / "ablations" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    command = [sys.executable, path.parents[1] / "run.py"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "the code beside it\n"
