"""Workers beside a process, played by small scripts."""

import signal
import sys
import time

import pytest
import torch

from ablations.study import jobs
from core.errors import InputError

GOOD = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); print(1); time.sleep(60)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1); time.sleep(60)"
DEAD = "import os; os.kill(os.getpid(), 9)"


@pytest.fixture
def playing(monkeypatch):
    """playing(script): a worker does that; the processes that were started."""
    started, popen = [], jobs.subprocess.Popen

    def start(command, env):
        started.append(popen(command, env=env, stdout=jobs.subprocess.PIPE))
        return started[-1]

    monkeypatch.setattr(jobs.subprocess, "Popen", start)

    def play(script):
        monkeypatch.setattr(jobs, "command", lambda *more: [sys.executable, "-c", script])
        return started

    yield play
    for process in started:
        process.kill()
        process.stdout.close()


@pytest.mark.parametrize(("script", "status"), [(GOOD, 143), (DEAF, -signal.SIGKILL)])
def test_after_an_error_workers_are_told_to_end_and_waited_for(playing, monkeypatch, script, status):
    monkeypatch.setattr(jobs, "PATIENCE", 2.0 if script == GOOD else 0.1)
    started, notes = playing(script), []

    def work():
        with jobs.workers(2, notes.append):
            for process in started:
                process.stdout.read(1)  # it listens by now
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert [process.returncode for process in started] == [status] * 2
    assert notes == []


def test_a_worker_that_dies_is_told_of(playing):
    playing(DEAD)
    notes = []
    with jobs.workers(1, notes.append):
        pass
    assert notes == ["a worker ended with status -9; its cells went to the others"]


def test_a_worker_ends_with_its_parent(monkeypatch):
    told = []
    monkeypatch.setattr(jobs.os, "getppid", iter([7, 7, 1]).__next__)
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(jobs.os, "kill", lambda pid, number: told.append((pid, number)))
    jobs.follow_parent()
    end = time.monotonic() + 10
    while not told and time.monotonic() < end:
        pass
    assert told == [(jobs.os.getpid(), signal.SIGTERM)]


def test_threads_are_divided(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    with pytest.raises(InputError, match="6 jobs would share 5 threads"):
        jobs.divide_threads(6, "cpu")
    jobs.divide_threads(2, "cpu")
    monkeypatch.undo()
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)


def test_a_worker_does_not_retry_what_it_was_started_beside(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "run.py", "--retry-failed", "--seeds", "2"])
    assert jobs.command("--worker") == [sys.executable, "run.py", "--seeds", "2", "--worker"]


def test_gpus_are_shared_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    assert [jobs._environment(i)["CUDA_VISIBLE_DEVICES"] for i in (1, 2, 3)] == ["5", "7", "4"]
