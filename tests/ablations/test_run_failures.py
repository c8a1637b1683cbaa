"""Cells that fail or are killed: recorded, told, and trained again."""

import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ablations.commands import conducting
from ablations.reporting import terminal
from ablations.study import cells, outcomes, reading, running
from ablations.study.passes import timing_claim
from core.errors import InputError
from core.ops import Parameter, joined, rewrite
from core.transforms.registry import REGISTRY, Transform


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
    assert "flash, seed 0: `FloatingPointError" in (command.out / "report" / "report.md").read_text()
    assert "failed: FloatingPointError" in capsys.readouterr().out
    monkeypatch.setattr(running, "train", train)
    assert command("--arms", "flash,baseline") == 1
    assert "1 cells failed before; --retry-failed trains them again" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(terminal, "conclude", lambda *rest: 1 / 0)
        assert command("--arms", "flash,baseline") == 1
    assert "no report: ZeroDivisionError: division by zero" in capsys.readouterr().out
    with monkeypatch.context() as patch:  # another process has just forgotten it
        patch.setattr(outcomes, "failed", lambda folder: True)
        conducting.retry(SimpleNamespace(retry_failed=True), command.out, [command.out / "cells" / "flash" / "seed7"])
    assert command("--arms", "flash,baseline", "--retry-failed") == 0
    assert not (command.out / "cells" / "flash" / "seed0" / "failed.json").exists()


def test_a_result_that_cannot_be_read_back_fails_its_cell(command, monkeypatch):
    """And is not trained again without end."""
    monkeypatch.setattr(running.timing, "ceiling", lambda out, cell: 1e-30)
    assert command("--arms", "baseline") == 1
    failure = json.loads((command.out / "cells" / "baseline" / "seed0" / "failed.json").read_text())
    assert "its result cannot be read back" in failure["error"]
    assert "mfu: Input should be less than" in failure["error"]


def test_a_study_that_is_gone_ends_and_goes_on_when_it_is_restored(command, monkeypatch, capsys):
    """Its cells have not failed, and no more are trained; what a killed process left is cleared up."""
    train, kept = running.train, command.out.with_name("kept.json")

    def removing(*arguments):
        (command.out / "study.json").rename(kept)
        return train(*arguments)

    monkeypatch.setattr(running, "train", removing)
    for _ in range(2):
        assert command("--arms", "baseline,decatt") == 2
        assert "study.json' is gone, which tells what the cells beside it are of; restore it" in capsys.readouterr().err
    assert not list(command.out.glob("cells/*/seed0/failed.json"))
    assert not (command.out / "cells" / "decatt").exists()
    monkeypatch.setattr(running, "train", train)
    kept.rename(command.out / "study.json")
    assert command("--arms", "baseline,decatt") == 0
    of = command.out / "cells" / "decatt"
    (of / "seed0.snapshots").mkdir()
    left = [command.out / f".{name}.json.0.partial" for name in ("study", "timing", "margins")]
    left += [of / "seed0.claim-1", Path(f"{timing_claim(command.out)}.claim-7")]
    for path in left:
        path.touch()
        os.utime(path, (0, 0))
    assert command("--arms", "baseline,decatt") == 0
    assert not [path for path in (*left, of / "seed0.snapshots") if path.exists()]


def test_a_loss_that_is_not_finite_fails_the_cell(command):
    """And nothing is decided where all cells fail."""
    until = "--seeds", "2", "--until", "accuracy=1"
    assert command("--arms", "baseline", "--learning-rate", "1e30", *until) == 1
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


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"wrap": {"mlp": lambda inner, site, x: inner(site, x) * torch.rand(())}}, "then .*; draw from site.key"),
        (
            {"wrap": {"mlp": lambda inner, site, x: inner(site, x) * site.params["mlp.fc2.bias"].data.add_(1)}},
            "it changes blocks.0.mlp.fc2.bias whenever it is computed",
        ),
        ({"config": lambda config: None}, r"cannot be made \(AttributeError: .*\); mend it, or leave it out"),
        ({"parameters": lambda config: {"mine.x": 3}}, "brings mine.x as 3; write Parameter"),
        ({"parameters": lambda config: {"x": Parameter((1,))}}, "brings x: such a name contains the transform's own"),
        ({"parameters": lambda config: {"blocks.0.mine": Parameter(("a",))}}, "brings blocks.0.mine as Parameter"),
    ],
)
def test_an_arm_that_breaks_the_seam_is_refused(command, monkeypatch, capsys, change, told):
    monkeypatch.setitem(REGISTRY, "mine", Transform(lambda: rewrite("mine", **change), "exact", "x", lattice=False))
    assert command("--arms", "baseline,mine") == 2
    assert re.search(f"error: .*mine.*{told}", capsys.readouterr().err)
    assert not command.out.exists()


def test_what_an_arm_sets_for_all_is_set_back(command, monkeypatch):
    def mlp(inner, site, x):
        os.chdir("/")
        torch.set_default_dtype(torch.float64)
        return inner(site, x)

    monkeypatch.setitem(
        REGISTRY, "mine", Transform(lambda: rewrite("mine", wrap={"mlp": mlp}), "exact", "x", lattice=False)
    )
    monkeypatch.chdir(command.out.parent)
    assert command("--arms", "mine,baseline", "--out", command.out.name) == 0
    assert torch.get_default_dtype() == torch.float32
    assert len(reading.results(command.out)) == 2


def test_no_transform_brings_what_the_model_has():
    with pytest.raises(InputError, match=r"a transform brings head.weight, which the model has; give it another name"):
        joined({"head.weight": Parameter((1,))}, {"head.weight": Parameter((2,))})


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
