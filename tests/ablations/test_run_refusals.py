"""What the command refuses, in one message and before it writes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import synthetic
from commands import call
from rich.console import Console

from ablations import report
from ablations.commands import options
from ablations.study import arms, reading, speaking, store
from ablations.study.presets import PRESETS
from core import files
from core.errors import InputError


def test_other_settings_in_the_same_folder_are_refused(command, refused):
    assert command("--arms", "baseline") == 0
    error = refused("--arms", "flash", "--learning-rate", "0.1", "--mlp", "48")
    assert "mlp 32 -> 48, learning_rate 0.005 -> 0.1" in error
    assert not (command.out / "cells" / "flash").exists()
    (command.out / "cells" / "baseline" / "seed0" / "result.json").rename(kept := command.out / "kept")
    failure = command.out / "cells" / "baseline" / "seed0" / "failed.json"
    store.write_json(failure, {"arm": "baseline", "seed": 0, "error": "no"})
    sent = ["--launcher", "slurm", "--slurm", "cluster=debug", "--arms", "baseline", "--mlp", "48"]
    assert "mlp 32 -> 48" in refused(*sent, "--retry-failed")
    assert failure.exists()
    kept.rename(failure.with_name("result.json"))
    assert "mlp 32 -> 48" in refused(*sent)  # nothing is left to send, and no job refuses it


def test_cells_of_another_machine_are_not_continued(command, refused):
    assert command("--arms", "baseline") == 0
    study = json.loads((command.out / "study.json").read_text())
    study["environment"]["torch"] = "2.0.0"
    store.write_json(command.out / "study.json", study)
    assert "other settings (torch '2.0.0' -> " in refused("--arms", "flash")


def test_a_study_of_the_old_layout_is_one_message(command, refused):
    assert command("--arms", "baseline", "--epochs", "1") == 0
    (command.out / "cells" / "baseline").rename(command.out / "baseline")
    (command.out / "cells").rmdir()
    assert "its cells lie beside study.json, not in cells/" in refused("--arms", "flash")
    with pytest.raises(InputError, match="train it again: python ablations/run.py --out"):
        reading.read([command.out])


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


@pytest.mark.parametrize("name", ["", "cells", "report", "../study/x"])
@pytest.mark.parametrize("what", ["a file", "a link to nothing"])
def test_what_is_in_the_way_of_a_folder_stays(command, refused, name, what):
    """At --out, above it, or within the study."""
    at = command.out / name if "x" not in name else command.out
    if at != command.out:
        synthetic.study(command.out, ["baseline"])
        shutil.rmtree(command.out / "cells")
    at.symlink_to("nowhere") if "link" in what else at.write_text("mine")
    command.out = command.out / name if "x" in name else command.out
    assert f"'{at}' is {what}, where a folder has to be; move it, or pass another --out" in refused()
    assert os.readlink(at) == "nowhere" if "link" in what else at.read_text() == "mine"


def test_two_arms_in_one_folder_are_refused(command, refused):
    """By a link; each would train in the other's place without end."""
    (command.out / "cells" / "flash").mkdir(parents=True)
    (command.out / "cells" / "mrt").symlink_to("flash")
    at = command.out / "cells"
    assert f"'{at / 'mrt'}' and '{at / 'flash'}' are one folder; remove" in refused("--arms", "flash,mrt")


@pytest.mark.parametrize("name", ["timing.json", "margins.json"])
def test_a_folder_in_the_way_of_a_file_is_told_before_anything_is_trained(command, refused, name):
    (synthetic.study(command.out, ["baseline"], timed=False) / name).mkdir()
    assert f"'{command.out / name}' is a folder, where a file has to be; move it" in refused()


@pytest.mark.parametrize("what", ["a file", "a link to nothing"])
def test_a_report_in_the_place_of_a_file_is_refused(tmp_path, capsys, what):
    study, at = synthetic.study(tmp_path / "study", ["baseline"]), tmp_path / "paper"
    at.symlink_to("nowhere") if "link" in what else at.write_text("mine")
    assert call(report.main, study, "--out", at) == 2
    assert f"'{at}' is {what}, where a folder has to be; move it, or pass another --out" in capsys.readouterr().err


def test_a_disk_without_room_is_refused(refused, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(total=2000, free=1000))
    assert "the cells that are left need 0 MiB of disk" in refused("--arms", "baseline")


@pytest.mark.parametrize(
    ("given", "expected"),
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
        (["--margin", "accuracy"], "margin accuracy= is no positive number up to 1,000; write for"),
        (["--max-minutes", "0"], "max minutes 0.0 is outside 0 to 525,600"),
        (["--max-minutes", "inf"], "max minutes inf is outside 0 to 525,600"),
        (["--arms", f"lattice:{','.join(arms.REGISTRY)}"], "combinations, and 4,096 are the most; name fewer"),
        (
            ["--launcher", "ray", "--parallel", "ddp"],
            "--launcher is for cells of one process each; leave out --parallel",
        ),
        (["--plan", "--timing-only"], "--timing-only belongs to a run"),
        (["--weights", "vit_b_61"], "unknown weights 'vit_b_61'; legal: vit_b_16,"),
        (["--weights", "none.safetensors"], "checkpoint 'none.safetensors' does not exist"),
        (["--data", "digits,cifar10"], "--out is for one data set, and --data has 2; leave it out, or pass one"),
        (["--design", "half"], "--design half is half of a lattice, and --arms has none: write --arms lattice:A,B,C,D"),
        (["--design", "quarter"], "unknown design 'quarter'; legal: full, half"),
        (["--arms", "lora"], "arm 'lora': lora is for pretrained weights; pass --weights, or leave it out"),
        (["--arms", "tome@9"], "tome cannot merge 9 of 5 tokens in every block; legal: 0 to 2"),
        (["--crop", "0"], "crop 0.0 is outside 0 to 1, 0 excluded"),
        (["--mixup", "-1"], "mixup -1.0 must be finite and 0 or above"),
        (["--mixup", "1", "--batch-size", "127"], "mixup 1.0 mixes images two by two, and a process has 127; pass an"),
        (["--smoothing", "1"], "smoothing 1.0 is outside 0 to below 1"),
        (["--ema", "1"], "ema 1.0 is outside 0 to below 1"),
        (["--ema-warmup", "True"], "ema_warmup is of an average of the weights, and there is none; pass --ema 0.9998"),
        (["--margin", "time=1", "time=5"], "--margin time=1 time=5 has a response twice; write it once"),
        (["--arms", "mrt@+7"], "arm 'mrt@+7': mrt tokens '' is not a whole number"),
        (["--processes", "0"], "processes 0 is outside 1 to 1,048,576"),
        (["--max-minutes", "525600.0001"], "max minutes 525600.0001 is outside 0 to 525,600"),
        (["--jobs", "1000000000"], "jobs 1000000000 is outside 1 to 1,024"),
        (["--width", "131072", "--mlp", "524288"], "one copy of its parameters needs 768.0 GiB of memory"),
        (["--arms", "registers@1000000000"], "arm 'registers@1000000000': one copy of its parameters needs 59.6 GiB"),
        (["--learning-rate", "-1"], "learning rate -1.0 must be finite and above 0"),
        (["--epochs", "3.0"], "--epochs: invalid literal for int() with base 10: '3.0'; write --epochs INT"),
        (["--image", "8px"], "--image: no type matching {None}|INT could be instantiated from ['8px']; write --image"),
        (["--flip", "maybe"], "invalid choice 'maybe' for argument '--flip'. Expected one of "),
        (["--epoch", "3"], "Unrecognized options: --epoch, 3; write --epochs INT"),
        (["--set"], "--set has no value; write one, or leave it out"),
        (["--eps", "1"], "eps 1.0 is outside 0 to 1, both excluded"),
        (["--seeds", "3", "--until", "accuracy=1", "--timing-only"], "--until trains seeds, and --timing-only trains"),
        (["--arms", "decatt", "--set", "decatt.layers=b'a'"], "decatt layers b'a'; legal: 'all' or block indices"),
        (["--arms", "budget", "--set", "budget.plan=()"], "budget plan () is no tuple of tuples of names"),
        (["--arms", "mrt", "--set", "mrt.weights=x.pth"], "mrt weights 'x.pth' are for mrt.scorer=features"),
    ],
)
def test_bad_input_is_one_message_and_writes_nothing(command, refused, given, expected):
    assert expected in refused(*given)
    assert not command.out.exists()


def test_what_takes_several_values_takes_them_however_they_are_given():
    words = "--preset quick --plugin=a.py --plugin b.py c.py --set mrt.tokens=7 --seeds=2 --set=decatt.weight=1"
    made = options.read(words.split(), Console(quiet=True))
    assert made.recipe.plugin == ("a.py", "b.py", "c.py") == tuple(speaking.all_values("--plugin", words.split()))
    assert made.recipe.set == (*PRESETS["quick"].set, "mrt.tokens=7", "decatt.weight=1")


def test_a_folder_that_holds_something_else_is_refused(command, refused):
    command.out.mkdir()
    (command.out / "thesis.tex").write_text("…")
    assert "is not empty and holds no study" in refused()


def test_list(command, capsys):
    assert command("--list") == 0
    listing = capsys.readouterr().out
    for word in ("decatt+flash", "matched", "cifar100-coarse", "compiled", "changes the objective"):
        assert word in listing


def test_report_of_no_study_is_refused(tmp_path, capsys):
    assert call(report.main, tmp_path) == 2
    assert "holds no study" in capsys.readouterr().err
