"""A tiny real study in processes that can be killed, and how much of it there is to compare."""

import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
from faults import study
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
OPTIONS = [
    "--preset", "quick", "--device", "cpu", "--image", "8", "--width", "16", "--depth", "1", "--heads", "2",
    "--mlp", "32", "--epochs", "3", "--batch-size", "128", "--dropout", "0.1", "--seeds", "1",
    "--crop", "0.3", "--mixup", "0.2", "--smoothing", "0.1", "--ema", "0.9",
    "--arms", "baseline,decatt,crs@0.5",
]  # fmt: skip
TIMES = {  # and what is made of them
    "mfu", "train_seconds", "stopped_seconds", "images_per_second", "step_ms_median", "warmup_seconds", "seconds",
    "reserved_bytes", "speed/images_per_second", "speed/step_ms", "files", "sha256",
}  # fmt: skip


@pytest.fixture
def many(request):
    """many(short, long): as --faults says."""
    return lambda short, long: long if request.config.getoption("--faults", "short") == "long" else short


@pytest.fixture(scope="session")
def context():
    """Processes that have torch and the study loaded when they start: a fault costs its own time alone."""
    os.environ |= environment()
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["faults.study"])
    return made


class Run:
    """One process of the command on the folder `out`; what it prints is in `log`."""

    def __init__(self, context, out, *options, **environment):
        self.log = out.with_name(f"{out.name}-{time.monotonic_ns()}.log")
        words = [*OPTIONS, *options, "--out", str(out)]
        self.process = context.Process(target=study.main, args=(words, environment, self.log))
        self.process.start()

    def wait(self, seconds=120):
        """The exit status, and that it was no traceback."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"it hangs: {self.text}"
        assert "Traceback" not in self.text
        return self.process.exitcode

    def kill(self):
        self.process.kill()
        self.process.join()

    @property
    def text(self):
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture
def start(context):
    """start(out, *options, **environment) -> Run"""
    runs = []

    def begin(out, *options, **environment):
        runs.append(Run(context, out, *options, **environment))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


@pytest.fixture(scope="session")
def reference(context, tmp_path_factory):
    """reference(**environment) -> (what an undisturbed study holds, its seconds), once for each."""
    made = {}

    def of(**environment):
        key = tuple(environment.items())
        if key not in made:
            out = tmp_path_factory.mktemp("undisturbed") / "study"
            begin = time.monotonic()
            assert Run(context, out, **environment).wait(600) == 0
            made[key] = content(out), time.monotonic() - begin
        return made[key]

    return of


@pytest.fixture
def draw(request):
    """Random numbers by the test's name."""
    return random.Random(request.node.name)


def environment():
    """Of processes of their own."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}


def content(out):
    """All that training decides, bit for bit: weights, losses, accuracies, which images; epochs in TensorBoard, too."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for folder in sorted(out.glob("cells/*/seed?")):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        result = json.loads((folder / "result.json").read_text())
        events = EventAccumulator(str(folder)).Reload()
        assert len(list(folder.glob("events.*"))) == 1
        shown = [(e.step, np.float32(e.value)) for e in events.Scalars("train/loss")]
        assert shown == [(row["epoch"], np.float32(row["train/loss"])) for row in rows]
        weights = load_file(folder / "best.safetensors")
        found[folder.relative_to(out).as_posix()] = (
            {name: tensor.tobytes() for name, tensor in weights.items()},
            [_timeless(row) for row in rows],
            _timeless(result),
            np.load(folder / "correct.npz")["correct"].tobytes(),
        )
    left = [p for p in out.rglob("*") if ".snapshots" in p.name or ".claim-" in p.name]
    assert not left, f"left behind: {left}"
    return found


def _timeless(values):
    return {name: value for name, value in values.items() if name not in TIMES}


def until(condition, seconds=60):
    """Waits for something; AssertionError if it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.02)
