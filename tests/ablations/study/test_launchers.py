"""Cells by a Ray cluster and by an array of jobs, as one process trains them."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from ordered import CELLS, RECIPE, Watch, order
from safetensors.torch import load_file

from ablations.study import claims, launchers, orders, running, snapshots
from ablations.study.recipes import Recipe
from ablations.study.signals import Stop
from ablations.study.store import cell_folder
from core.errors import InputError

SAME = ("best_val_accuracy", "final_val_accuracy", "final_val_loss", "final_train_loss")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The cells as one process trains them."""
    out, threads = tmp_path_factory.mktemp("alone") / "study", torch.get_num_threads()
    torch.set_num_threads(1)
    study = running.prepare("baseline,decatt", RECIPE, Path("data"))
    study = running.record(study, "quick", out, False, False)
    arms = {cell.arm.name: cell for cell in study.cells}
    running.run([(arms[arm], seed) for arm, seed in CELLS], study.made_by, out, Watch(), Stop())
    torch.set_num_threads(threads)
    return out


@pytest.fixture(scope="module", autouse=True)
def _token():
    """Ray's processes know each other by a token of these tests alone; none is written to the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        yield


@pytest.fixture
def slowly(monkeypatch):
    """A snapshot after every step, and steps that take a while."""

    def perform(*arguments):
        import time

        from ablations.study import orders, snapshots

        if not hasattr(snapshots, "saved"):
            snapshots.EVERY, snapshots.SHARE, snapshots.saved = 0.0, float("inf"), snapshots.Snapshots.save
            snapshots.Snapshots.save = lambda *all: (snapshots.saved(*all), time.sleep(0.05))
        return orders.perform(*arguments)

    monkeypatch.setattr(launchers, "perform", perform)


@contextmanager
def signalled(out, *numbers):
    """The first processes that have written snapshots of a cell get a signal each; the list of those cells."""
    victims, over = [], threading.Event()

    def watch():
        while len(victims) < len(numbers) and not over.wait(0.02):
            for cell in [cell for cell in CELLS if cell not in victims]:
                folder = cell_folder(out, *cell)
                pid = claims._read(claims._newest(folder) or out).get("pid")
                if pid and snapshots.reached(folder) > 2 and len(victims) < len(numbers):
                    os.kill(pid, numbers[len(victims)])
                    victims.append(cell)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield victims
    finally:
        over.set()
        thread.join()


def check_same(alone, out, cells):
    for cell in cells:
        one, other = (cell_folder(at, *cell) for at in (alone, out))
        ours, theirs = (json.loads((at / "result.json").read_text()) for at in (one, other))
        assert {key: ours[key] for key in SAME} == {key: theirs[key] for key in SAME}
        ours, theirs = (load_file(at / "best.safetensors") for at in (one, other))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def check_survives(alone, out, send, cells, *more):
    watch = Watch()
    with signalled(out, signal.SIGKILL, *more) as victims:
        assert orders.run(cells, order(out), send, watch) == 0
    assert len(victims) == 1 + len(more)
    assert [note for note in watch.notes if "sent again" in note and note.startswith("{} seed {}".format(*victims[0]))]
    assert sorted((o["arm"], o["seed"]) for o in watch.outcomes) == sorted(cells)
    check_same(alone, out, cells)


@pytest.fixture
def cluster():
    """A Ray cluster of this machine, at a port of its own."""
    pytest.importorskip("ray", reason="the extra ray is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # sockets' paths are short
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2"]
    options = ["--node-ip-address=127.0.0.1", f"--port={address[10:]}", f"--temp-dir={folder}"]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [*command, *options, "--include-dashboard=false", "--disable-usage-stats"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 30
    while socket.socket().connect_ex(("127.0.0.1", int(address[10:]))):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.2)
    yield address
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_ray_cluster_survives_a_killed_worker(alone, cluster, tmp_path, slowly):
    out = tmp_path / "study"
    with launchers.launched("ray", order(out), cluster, ()) as send:
        orders.one(send, order(out), "open")
        check_survives(alone, out, send, CELLS)


def test_ray_of_this_machine(alone, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setattr(ray, "init", partial(ray.init, address="local", num_cpus=2))
    out = tmp_path / "study"
    with launchers.launched("ray", order(out), "", ()) as send:
        assert orders.run(CELLS, order(out), send, Watch()) == 0
        check_same(alone, out, CELLS)
        with pytest.raises(InputError, match="unknown data set 'nothing'"):
            orders.one(send, order(out, recipe=Recipe(data="nothing", device="cpu")), "open")


def test_jobs_of_an_array_survive_a_kill_and_the_end_of_their_time(alone, tmp_path, slowly, monkeypatch):
    submitit = pytest.importorskip("submitit", reason="the extra slurm is not installed")
    monkeypatch.setattr(submitit.Job, "_results_timeout_s", 1)  # it waits so long for what a killed job has not written
    out = tmp_path / "study"
    with launchers.launched("slurm", order(out), "", ["cluster=local"]) as send:
        check_survives(alone, out, send, CELLS[:2], signal.SIGUSR2)  # what Slurm sends before the end
    requeued = [path.read_text() for path in (tmp_path / "study.slurm").glob("*_log.*")]
    assert sum("Requeued" in text for text in requeued) == 1


def test_the_end_of_a_jobs_time_is_no_failure_of_its_cell():
    """Submitit exits within whatever the cell does; what exits by itself has failed."""

    def work():
        try:
            os.kill(os.getpid(), signal.SIGUSR2)
        except (Exception, SystemExit):
            return "failed"

    before = signal.signal(signal.SIGUSR2, lambda number, frame: sys.exit(144))
    try:
        with pytest.raises(SystemExit) as end:
            launchers._Resumable(work)()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert end.value.code == 144


def test_ray_where_something_else_listens(tmp_path):
    """Ray waits in code of its own, which no exception reaches: the process ends, with one message."""
    pytest.importorskip("ray", reason="the extra ray is not installed")
    begin = (
        "import sys; from ablations.commands.main import main; from ablations.study import launchers; "
        "launchers.JOIN = 3.0; sys.argv[0] = 'run.py'; main()"
    )
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        options = ["--preset", "quick", "--device", "cpu", "--launcher", "ray", "--ray-address", address]
        done = subprocess.run(
            [sys.executable, "-c", begin, *options, "--out", str(tmp_path / "study")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, timeout=100,
        )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == f"error: no Ray cluster at '{address}' within 3 s: --ray-address?"
    assert not (tmp_path / "study").exists()
