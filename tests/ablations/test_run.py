"""The command, end to end on a tiny model: what it writes, how it continues, what it refuses."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ablations import report
from ablations.commands import conducting
from ablations.commands.main import main
from ablations.reporting import compose
from ablations.reporting import figures as drawing
from ablations.study import arms, cells, evaluation, profiling, reading, running, schema, store, timing
from core import engine, vit
from core.data import sets as data_sets
from core.errors import InputError
from core.weights import checkpoints as weights

DRAW = drawing.draw
TINY = [
    "--preset", "quick", "--device", "cpu", "--image", "8", "--width", "16", "--depth", "1", "--heads", "2",
    "--mlp", "32", "--epochs", "2", "--batch-size", "128", "--seeds", "1",
]  # fmt: skip
FIELDS = {
    "arm", "seed", "preset", "data", "parameters", "epochs", "best_val_accuracy", "final_val_accuracy",
    "final_train_loss", "train_seconds", "images_per_second", "step_ms_median", "peak_bytes", "engine", "device",
    "precision", "torch",
}  # fmt: skip
TIMES = {"files", "mfu", "train_seconds", "images_per_second", "step_ms_median", "warmup_seconds"}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """command(*options) -> exit status; the study is at command.out. Figures, which take seconds, are not drawn."""

    monkeypatch.setattr(drawing, "draw", lambda comparisons, out: {})
    monkeypatch.setattr(timing, "BLOCK", 0.001)
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setattr(timing, "SHARE", 0)
    monkeypatch.setattr(timing, "MOST", 0)
    monkeypatch.setattr(timing.measure, "ceiling", lambda dtype, device: 1e11)

    def call(*options):
        monkeypatch.setattr("sys.argv", ["run.py", "--out", str(tmp_path / "study"), *TINY, *options])
        monkeypatch.chdir(tmp_path)
        try:
            main()
        except SystemExit as stop:
            return stop.code or 0
        return 0

    call.out = tmp_path / "study"
    return call


@pytest.fixture
def figures(command, monkeypatch):
    """Draws them."""
    monkeypatch.setattr(drawing, "draw", DRAW)


def refused(command, capsys, *options):
    """The message of a refused command, which must have written nothing."""
    capsys.readouterr()
    assert command(*options) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert len(error.splitlines()) <= 2
    return error


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
    assert "time not timed: run.py --timing-only" in printed


def test_arms_differ_by_their_transforms_only(command):
    """flash is exact: same initial weights, order and augmentation give the baseline's training to rounding."""
    assert command("--arms", "baseline,flash,decatt") == 0
    rows = {r["arm"]: reading.history(command.out, r) for r in reading.results(command.out)}
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
    assert command("--arms", "baseline") == 0
    before = (command.out / "cells" / "baseline" / "seed0" / "result.json").stat().st_mtime_ns
    trained = []
    train = running.train
    monkeypatch.setattr(running, "train", lambda cell, *rest: trained.append(cell.arm.name) or train(cell, *rest))
    assert command("--arms", "baseline,flash") == 0
    assert trained == ["flash"]
    assert (command.out / "cells" / "baseline" / "seed0" / "result.json").stat().st_mtime_ns == before


def test_exact_arms_are_trained_at_the_first_seed(command, capsys):
    options = ["--arms", "baseline,baseline-again,flash,decatt,decatt+flash", "--seeds", "2"]
    assert command(*options) == 0
    assert "0 of 7 cells finished before, 7 to run (3 more are known from their twins; " in capsys.readouterr().out
    cells_of = {(r["arm"], r["seed"]) for r in reading.results(command.out)}
    assert {arm for arm, seed in cells_of if seed == 1} == {"baseline", "decatt"}
    assert command(*options, "--every-arm") == 0
    assert len(reading.results(command.out)) == 10


def test_without_its_twin_an_exact_arm_is_trained_at_every_seed(command):
    assert command("--arms", "flash,decatt", "--seeds", "2") == 0
    assert len(reading.results(command.out)) == 4


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
    assert running.until(lambda: next(decided), range(3, 11), 60, one) == (4, 4, "all is decided")
    assert trained == [3, 4, 5, 6]
    assert running.until(lambda: False, range(3), 60, one)[0] == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running.time, "monotonic", lambda: next(clock))  # a seed takes half a minute
        count, _, why = running.until(lambda: False, range(50), 3, one)
    assert 2 <= count <= 4
    assert "longer than 3 minutes" in why


def test_until_is_of_the_studys_verdicts(command, capsys):
    """A margin that nothing can miss is met at the second seed, and the intervals allow for all looks."""
    assert command("--arms", "baseline,decatt", "--seeds", "4", "--until", "accuracy=9999", "--margin", "time=5") == 0
    assert {r["seed"] for r in reading.results(command.out)} == {0, 1}
    assert "2 of at most 4 seeds; all is decided" in capsys.readouterr().out
    assert schema.read(command.out / "margins.json", schema.MarginsFile) == {
        "margins": {"accuracy": 0.5, "time": 5.0, "memory": 2.0}, "looks": 3,
    }  # fmt: skip


def test_a_second_seed_compiles_nothing(command, monkeypatch):
    compiled = []

    def counting(graph, inputs):
        compiled.append(graph)
        return graph

    def compile_(fn):
        return torch.compile(engine.fresh(fn), fullgraph=True, dynamic=False, backend=counting)

    monkeypatch.setattr(engine, "_compile", compile_)
    assert command("--arms", "flash,decatt", "--seeds", "3", "--engine", "compiled") == 0  # without a timing pass
    assert len(reading.results(command.out)) == 6
    assert len(compiled) == 2  # the losses of two arms


def test_other_settings_in_the_same_folder_are_refused(command, capsys):
    assert command("--arms", "baseline") == 0
    error = refused(command, capsys, "--arms", "flash", "--learning-rate", "0.1", "--mlp", "48")
    assert "mlp 32 -> 48, learning_rate 0.005 -> 0.1" in error
    assert not (command.out / "cells" / "flash").exists()


def test_cells_of_another_machine_are_not_continued(command, capsys):
    assert command("--arms", "baseline") == 0
    study = json.loads((command.out / "study.json").read_text())
    study["environment"]["torch"] = "2.0.0"
    store.write_json(command.out / "study.json", study)
    assert "other settings (torch '2.0.0' -> " in refused(command, capsys, "--arms", "flash")


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


def test_a_study_of_the_old_layout_is_one_message(command, capsys):
    assert command("--arms", "baseline", "--epochs", "1") == 0
    (command.out / "cells" / "baseline").rename(command.out / "baseline")
    (command.out / "cells").rmdir()
    assert "its cells lie beside study.json, not in cells/" in refused(command, capsys, "--arms", "flash")
    with pytest.raises(InputError, match="train it again: python ablations/run.py --out"):
        reading.read([command.out])


def test_the_best_weights_are_kept_and_not_the_last(command, monkeypatch):
    seen, evaluate = [], cells.evaluate

    def falling(params, *rest):
        seen.append(params)
        correct = torch.zeros(360, dtype=torch.bool)
        correct[: 100 - len(seen)] = True
        return evaluate(params, *rest)._replace(correct=correct)

    monkeypatch.setattr(cells, "evaluate", falling)
    assert command("--arms", "baseline") == 0
    saved, about = weights.load(command.out / "cells" / "baseline" / "seed0" / "best.safetensors")
    assert about["accuracy"] == 99 / 360
    assert all(torch.equal(saved[name], seen[0][name]) for name in saved)
    assert not torch.equal(saved["head.weight"], seen[1]["head.weight"])


def test_no_name_in_ablations_hides_pythons_own():
    """`python ablations/run.py` puts them before the standard library, up to Python 3.15's."""
    names = {path.stem for path in Path(report.__file__).parent.iterdir()}
    assert not names & {*sys.stdlib_module_names, "annotationlib", "compression", "profiling"} - {"__init__"}


def test_a_refusal_imports_neither_figures_nor_statistics():
    """They take longer than torch does."""
    script = (
        "import sys; from ablations.commands.main import main; sys.argv = ['run.py', '--arms', 'falsh']\n"
        "try: main()\nexcept SystemExit: print(*sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    slow = {"scipy", "pandas", "matplotlib", "sklearn", "torchvision", "statsmodels", "markdown", "tensorboard"}
    assert not slow & set(out.split())


def test_a_file_in_the_way_is_one_message(command, capsys):
    command.out.write_text("")
    assert "Not a directory" in refused(command, capsys) or "exists" in refused(command, capsys)


def test_mrt_has_the_baselines_token_count(command, figures):
    """Whatever the patch: the comparison stays one of equal compute."""
    assert command("--arms", "mrt", "--image", "32", "--patch", "8", "--epochs", "1") == 0
    settings = json.loads((command.out / "study.json").read_text())["configuration"]["set"]
    assert settings == ["uniform.patch=8", "mrt.tokens=16", "mrt.min_patch=4", "mrt.max_patch=16"]
    assert (command.out / "report" / "figures" / "tokens_mrt.png").stat().st_size > 0


def test_a_killed_cell_is_trained_again_from_scratch(command, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cells, "evaluate", killed)
    assert command("--arms", "baseline") == 130
    folder = command.out / "cells" / "baseline" / "seed0"
    assert not (folder / "result.json").exists()
    monkeypatch.undo()
    assert reading.results(command.out) == []


def test_a_failed_cell_is_recorded_and_the_others_go_on(command, monkeypatch, capsys):
    train = running.train

    def failing(cell, *rest):
        if cell.arm.name == "flash":
            raise FloatingPointError("loss is nan after epoch 1")
        return train(cell, *rest)

    monkeypatch.setattr(running, "train", failing)
    assert command("--arms", "flash,baseline") == 1
    failure = json.loads((command.out / "cells" / "flash" / "seed0" / "failed.json").read_text())
    assert failure["error"] == "FloatingPointError: loss is nan after epoch 1"
    assert "Traceback" in failure["traceback"]
    assert "flash, seed 0: FloatingPointError" in (command.out / "report" / "report.md").read_text()
    assert "failed: FloatingPointError" in capsys.readouterr().out
    monkeypatch.setattr(running, "train", train)
    assert command("--arms", "flash,baseline") == 1
    assert "1 cells failed before; --retry-failed trains them again" in capsys.readouterr().out
    assert command("--arms", "flash,baseline", "--retry-failed") == 0
    assert not (command.out / "cells" / "flash" / "seed0" / "failed.json").exists()


def test_a_loss_that_is_not_finite_fails_the_cell(command):
    assert command("--arms", "baseline", "--learning-rate", "1e30") == 1
    failure = json.loads((command.out / "cells" / "baseline" / "seed0" / "failed.json").read_text())
    assert re.match(
        r"FloatingPointError: loss is (nan|inf) at step [23] \(epoch 1\); the last finite one was \d", failure["error"]
    )
    assert not (command.out / "cells" / "baseline" / "seed0" / "result.json").exists()


def test_an_arm_that_breaks_in_the_first_check_fails_alone(command, monkeypatch):
    def broken(self, seed, key, start=cells.Prepared.start):
        if self.arm.name == "decatt":
            raise RuntimeError("no kernel image is available")
        return start(self, seed, key)

    monkeypatch.setattr(cells.Prepared, "start", broken)
    assert command("--arms", "decatt,flash") == 1
    failure = json.loads((command.out / "cells" / "decatt" / "seed0" / "failed.json").read_text())
    assert failure["error"] == "RuntimeError: no kernel image is available"
    assert [r["arm"] for r in reading.results(command.out)] == ["flash"]


def test_after_an_error_that_stays_a_fresh_process_goes_on(command, monkeypatch):
    """The failure is recorded, and the same command is executed again without what it asks for once."""
    monkeypatch.setattr(running, "train", lambda *rest: 1 / 0)
    monkeypatch.setattr(running, "_usable", lambda device: False)
    monkeypatch.setattr(sys, "orig_argv", ["python", "run.py", "--arms", "flash", "--retry-failed"])
    executed = []
    monkeypatch.setattr(os, "execv", lambda path, words: executed.append(words) or sys.exit(99))
    assert command("--arms", "flash,baseline", "--max-minutes", "5") == 99
    assert (command.out / "cells" / "flash" / "seed0" / "failed.json").exists()
    assert not (command.out / "cells" / "baseline").exists()
    ((_, *words),) = executed
    assert words[:3] == ["run.py", "--arms", "flash"]
    assert words[3] == "--max-minutes"
    assert 4 < float(words[4]) < 5


def test_a_disk_without_room_is_refused(command, monkeypatch, capsys):
    monkeypatch.setattr(conducting.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "the cells that are left need 0 MiB of disk" in refused(command, capsys, "--arms", "baseline")


def test_the_loop_of_an_arm_is_given_back(command, monkeypatch):
    """Its graph and its buffers; what is compiled stays for the timing pass."""
    seen = []
    monkeypatch.setattr(cells.Prepared, "release", lambda cell: seen.append(cell.arm.name))
    assert command("--arms", "flash,decatt", "--seeds", "2", "--every-arm") == 0
    assert seen == ["flash", "decatt"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--arms", "falsh"],
            f"unknown optimization 'falsh'; legal: {', '.join(arms.REGISTRY)}, baseline, fp32, bf16; did you mean "
            "'flash'?",
        ),
        (
            ["--preset", "quik"],
            "unknown preset 'quik'; legal: quick, matched, matched-256, published, finetune, pretrain; did you mean "
            "'quick'?",
        ),
        (["--data", "digit"], "did you mean 'digits'?"),
        (["--engine", "compild"], "did you mean 'compiled'?"),
        (["--precision", "fp16"], "unknown precision 'fp16'; legal: auto, fp32, bf16"),
        (["--data", "folder:nowhere"], "folder 'nowhere' does not exist"),
        (["--heads", "3"], "heads 3 do not divide width 16; legal: 1, 2, 4, 8, 16"),
        (["--patch", "3"], "patch 3 does not divide image 8; legal: 1, 2, 4, 8"),
        (["--batch-size", "1438"], "batch size 1438 does not fit the 1437 training images"),
        (["--set", "decatt.norm=frob"], "unknown decatt norm 'frob'"),
        (["--set", "mrt.tokens=8"], "tokens 8 cannot be had from image 8 with patches 2 to 8; nearest: 7 or 10"),
        (["--seeds", "0"], "seeds 0 is outside 1 to 10,000"),
        (["--until", "accuracy=0.5"], "--until with one seed decides nothing: pass --seeds with the most there may be"),
        (["--seeds", "4", "--until", "time=2"], "--until is of accuracy: seeds tell nothing of time or memory"),
        (["--margin", "acuracy=1"], "unknown margin of 'acuracy'; legal: accuracy, time, memory"),
        (["--margin", "accuracy"], "margin accuracy= is no positive number; write for example accuracy=0.5"),
        (["--max-minutes", "0"], "max minutes 0 must be above 0"),
        (["--plan", "--timing-only"], "--timing-only belongs to a run"),
        (["--weights", "vit_b_61"], "unknown weights 'vit_b_61'; legal: vit_b_16,"),
        (["--weights", "none.safetensors"], "checkpoint 'none.safetensors' does not exist"),
        (["--data", "digits,cifar10"], "--out is for one data set, and --data has 2; leave it out, or pass one"),
        (["--design", "half"], "--design half is half of a lattice, and --arms has none: write --arms lattice:A,B,C,D"),
        (["--design", "quarter"], "unknown design 'quarter'; legal: full, half"),
        (["--arms", "lora"], "arm 'lora': lora is for pretrained weights; pass --weights, or leave it out"),
        (["--arms", "tome@9"], "tome cannot merge 9 of 5 tokens in every block; legal: 0 to 2"),
        (["--learning-rate", "-1"], "learning rate -1.0 must be finite and above 0"),
    ],
)
def test_bad_input_is_one_message_and_writes_nothing(command, capsys, options, expected):
    assert expected in refused(command, capsys, *options)
    assert not command.out.exists()


def test_a_folder_that_holds_something_else_is_refused(command, capsys):
    command.out.mkdir()
    (command.out / "thesis.tex").write_text("…")
    assert "is not empty and holds no study" in refused(command, capsys)


def test_list(command, capsys):
    assert command("--list") == 0
    listing = capsys.readouterr().out
    for word in ("decatt+flash", "matched", "cifar100-coarse", "compiled", "changes the objective"):
        assert word in listing


def test_image_folders_train(command, image_folder):
    assert command("--arms", "baseline", "--data", f"folder:{image_folder}", "--batch-size", "8", "--epochs", "4") == 0
    (result,) = reading.results(command.out)
    assert result["best_val_accuracy"] == 1.0  # dark against bright
    assert json.loads((command.out / "study.json").read_text())["configuration"]["flip"] is True


def test_report_of_no_study_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        report.main()
    assert stop.value.code == 2
    assert "holds no study" in capsys.readouterr().err


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


SMALL = ["--device", "cpu", "--patch", "4", "--width", "16", "--depth", "2", "--heads", "2", "--mlp", "32"]


def exits(monkeypatch, *options):
    """The exit status of the command."""
    monkeypatch.setattr("sys.argv", ["run.py", *map(str, options)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


@pytest.fixture
def finetune(image_folder, tmp_path, monkeypatch):
    """finetune(checkpoint, *options) -> exit status; the study is runs/finetune-images of tmp_path."""
    monkeypatch.chdir(tmp_path)
    fixed = ["--data", f"folder:{image_folder}", "--image", "16", "--batch-size", "8", "--epochs", "2", *SMALL]
    return lambda checkpoint, *options: exits(
        monkeypatch, "--preset", "finetune", "--weights", checkpoint, *fixed, *options
    )


def test_pretraining_then_fine_tuning(finetune, image_folder, tmp_path, monkeypatch, capsys):
    """Study 2 without a network, at another image size; it starts from the checkpoint, and is evaluated again."""
    monkeypatch.setattr(timing.measure, "ceiling", lambda dtype, device: 1e12)  # slow in bf16 on most CPUs
    options = ["--data", f"folder:{image_folder}", "--image", "8", "--batch-size", "8", "--epochs", "2"]
    assert exits(monkeypatch, "--preset", "pretrain", *SMALL, *options) == 0
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
    monkeypatch.chdir(tmp_path)

    def call(data):
        return exits(monkeypatch, *TINY, "--arms", "baseline", "--batch-size", "8", "--data", data)

    assert call(f"folder:{image_folder},digit") == 2
    assert "did you mean 'digits'?" in capsys.readouterr().err
    assert call("digits,digits") == 2
    assert "gives two studies one folder" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    shutil.copytree(image_folder, tmp_path / "others")
    assert call(f"folder:{image_folder},folder:others") == 0
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"quick-images", "quick-others"}
    monkeypatch.setattr(
        "ablations.commands.main.execute", lambda command, console, stop: int(command.recipe.data == "digits")
    )
    assert call("digits,folder:others") == 1


def test_profiles_are_a_pass_of_their_own(command, monkeypatch, capsys):
    assert command("--arms", "baseline,flash,decatt", "--profile") == 0
    for arm in ("baseline", "flash", "decatt"):
        assert (command.out / "cells" / arm / "profile" / "trace.json.gz").exists()
        folder = command.out / "report" / "profiles" / arm
        assert {"operations.md", "categories.png", "memory.png", "categories.svg", "memory.svg"} == {
            p.name for p in folder.iterdir()
        }
        assert (command.out / "report" / "tensorboard" / arm / "step.pt.trace.json.gz").stat().st_size > 0
    assert "Difference from `baseline`" in (folder.with_name("flash") / "operations.md").read_text()
    before = (command.out / "cells" / "flash" / "profile" / "profile.json").stat().st_mtime_ns
    shutil.rmtree(command.out / "cells" / "decatt" / "profile")

    def failing(*args, **options):
        raise RuntimeError("no profiler")

    monkeypatch.setattr(profiling, "profile", failing)
    assert command("--arms", "baseline,flash,decatt", "--profile") == 1
    assert "profile of decatt: failed: RuntimeError: no profiler" in capsys.readouterr().out
    assert "no profiler" in (command.out / "cells" / "decatt" / "profile" / "failed.json").read_text()
    assert (command.out / "cells" / "flash" / "profile" / "profile.json").stat().st_mtime_ns == before
    assert len(reading.results(command.out)) == 3
