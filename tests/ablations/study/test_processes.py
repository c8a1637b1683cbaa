"""Cells trained by two processes, as torchrun starts them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faults.processes import until

from ablations.study import claims, processes, running, snapshots
from ablations.study.recipes import Recipe
from ablations.study.store import cell_folder
from core.data import sets
from core.errors import InputError
from core.parallel import ALONE, Share

ROOT = Path(__file__).parents[3]
TINY = [
    "--preset", "quick", "--device", "cpu", "--engine", "eager", "--width", "16", "--depth", "1", "--heads", "2",
    "--mlp", "32", "--epochs", "2", "--batch-size", "128", "--seeds", "1", "--precision", "fp32",
]  # fmt: skip


def start(out, *options, script="ablations/run.py", **environment):
    """run.py with these options and variables, beside this process."""
    command = [sys.executable, str(ROOT / script), *TINY, "--out", str(out), *options]
    variables = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def begin(out, *options, second=(), script="ablations/run.py"):
    """Two processes, with the variables that torchrun gives them."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start(out, *options, *(second if rank else ()), script=script, RANK=str(rank), LOCAL_RANK=str(rank), **both)
        for rank in (0, 1)
    ]


def ended(process, seconds=300):
    """(exit status, output, errors)"""
    output, errors = process.communicate(timeout=seconds)
    return process.returncode, output, errors


def pair(out, *options, second=()):
    """(exit status, output, errors) of each of two processes."""
    return [ended(process) for process in begin(out, *options, second=second)]


def rows(out, arm):
    return [json.loads(line) for line in (out / "cells" / arm / "seed0/metrics.jsonl").read_text().splitlines()]


def test_a_study_of_two_processes_is_that_of_one(tmp_path):
    """The leader writes all, the other nothing; losses are equal to float32's rounding; the timing pass runs."""
    arms = ["--arms", "baseline,decatt", "--crop", "0.3", "--mixup", "0.2", "--ema", "0.9"]
    (status, output, errors), (other_status, other_output, _) = pair(tmp_path / "two", *arms, "--parallel", "fsdp")
    assert (status, other_status) == (0, 0), errors
    assert "2 of 2" in output or "[2/2]" in output
    assert other_output == ""
    one = start(tmp_path / "one", *arms)
    one.communicate(timeout=300)
    assert one.returncode == 0
    for arm in ("baseline", "decatt"):
        for mine, other in zip(rows(tmp_path / "two", arm), rows(tmp_path / "one", arm), strict=True):
            for name in ("train/loss", "train/accuracy", "val/loss", "val/accuracy"):
                assert mine[name] == pytest.approx(other[name], rel=1e-4), name
        best = [tmp_path / n / "cells" / arm / "seed0/best.safetensors" for n in ("one", "two")]
        assert abs(best[0].stat().st_size - best[1].stat().st_size) < 200  # whole weights; what is told differs
    configuration = json.loads((tmp_path / "two/study.json").read_text())["configuration"]
    assert (configuration["parallel"], configuration["processes"]) == ("fsdp", 2)
    assert {"baseline", "decatt"} <= json.loads((tmp_path / "two/timing.json").read_text())["ratios"].keys()


def test_processes_that_disagree_are_refused(tmp_path):
    ends = pair(tmp_path / "study", "--arms", "baseline", "--parallel", "ddp", second=("--epochs", "3"))
    assert [status for status, *_ in ends] == [2, 2]
    message = "error: processes 0 and 1 disagree about epochs 2 and 3; start all with the same command\n"
    assert [errors.splitlines(keepends=True)[-1] for *_, errors in ends] == [message, f"process 1: {message}"]
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_other_and_the_cell_goes_on(tmp_path, lost):
    """Its claim stays, as of one that died: that counts, and the same command continues from the snapshot."""
    out, options = tmp_path / "study", ["--arms", "baseline", "--parallel", "fsdp", "--epochs", "5"]
    cell, slowly = cell_folder(out, "baseline", 0), {"script": "tests/faults/study.py"}  # a snapshot after every step
    both = begin(out, *options, **slowly)
    until(lambda: snapshots.reached(cell) > 3)
    both[lost].kill()
    status, _, errors = ended(both[1 - lost], 60)
    assert status == 2, errors
    assert "the processes are no longer together" in errors
    assert "Traceback" not in errors
    assert not running.settled(cell)
    assert claims._take(cell, snapshots.reached(cell)).died == 1  # and this process gives it back
    claims._newest(cell).unlink()
    (status, output, errors), _ = map(ended, begin(out, *options, **slowly))
    assert status == 0, errors
    assert "continued from step" in output
    assert running.settled(cell)


def test_how_many_there_are(monkeypatch):
    assert processes.count(None, None, present=True) is None
    assert processes.count("fsdp", 64, present=False) == 64
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert processes.count("ddp", None, present=True) == processes.count("ddp", 4, present=True) == 4
    with pytest.raises(InputError, match="4 processes without --parallel; pass --parallel ddp, or fsdp"):
        processes.count(None, None, present=True)
    with pytest.raises(InputError, match="--processes 2, but 4 started; write torchrun --nproc-per-node 2"):
        processes.count("ddp", 2, present=True)
    with pytest.raises(InputError, match="unknown parallel 'dpp'; legal: ddp, fsdp; did you mean 'ddp'?"):
        processes.count("dpp", None, present=True)
    with pytest.raises(InputError, match="processes 0 is outside 1 to 1,048,576"):
        processes.count("ddp", 0, present=False)


TORCHRUN = {"WORLD_SIZE": 8, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 8, "MASTER_PORT": 9, "MASTER_ADDR": "a"}


@pytest.mark.parametrize("name", [name for name in TORCHRUN if name != "WORLD_SIZE"])
def test_what_torchrun_sets_is_set(monkeypatch, name):
    for other, value in (TORCHRUN | {name: ""}).items():
        monkeypatch.setenv(other, str(value))
    told = f"WORLD_SIZE is 8, as torchrun sets it, and {name} is ''; unset WORLD_SIZE, or write torchrun"
    with pytest.raises(InputError, match=told), processes.joined("cpu", "ddp"):
        pass


@pytest.mark.parametrize(
    ("name", "value", "most"), [("RANK", 8, 7), ("LOCAL_RANK", 9, 7), ("MASTER_PORT", 99999, "65,535")]
)
def test_a_place_among_processes_that_is_none(monkeypatch, name, value, most):
    for other, set_to in (TORCHRUN | {name: value}).items():
        monkeypatch.setenv(other, str(set_to))
    with pytest.raises(InputError, match=f"{name} {value} is outside [01] to {most}"), processes.joined("cpu", "ddp"):
        pass


def test_without_parallel_nobody_is_waited_for(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(InputError, match="8 processes without --parallel"), processes.joined("cpu", None):
        pass


def test_no_more_processes_than_gpus(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    processes.check("cpu")
    with pytest.raises(InputError, match="8 processes on a machine with 4 GPUs; pass --nproc-per-node 4"):
        processes.check("cuda")


def test_a_recipe_for_several_processes():
    data = sets.outline("digits")
    recipe = Recipe(parallel="fsdp", processes=3, batch_size=32, device="cpu").resolve_machine(present=False)
    with pytest.raises(InputError, match="batch size 32 is not divisible by 3 processes; pass --batch-size 30 or 33"):
        recipe.resolve_data(data)
    with pytest.raises(InputError, match="'graphed' is for one process"):
        Recipe(parallel="ddp", processes=2, device="cuda", engine="graphed").resolve_machine(present=False)


def test_a_single_process_says_nothing_to_others():
    assert processes.share(None, None) == ALONE
    assert processes.share("fsdp", 8) == Share(0, 8, True)
    assert processes.told("own") == "own"
    processes.agree({"epochs": 3})
    processes.leave_after(RuntimeError("Connection closed by peer"))
    assert processes.in_turn(lambda: 5) == 5


def test_an_environment_that_is_not_torchruns_does_not_count(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert processes.leads()
    monkeypatch.setenv("WORLD_SIZE", "x")
    assert (processes.started(), processes.leads()) == (1, True)
