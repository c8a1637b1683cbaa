"""Killed or told to end at any moment, the same command goes on, and nothing tells that it was."""

import os
import signal
import time

import pytest
from faults.processes import content, until


@pytest.mark.parametrize(("engine", "short", "long"), [("eager", 2, 50), ("graphed", 2, 50), ("compiled", 1, 50)])
def test_killed_at_random_moments(start, reference, many, tried, draw, tmp_path, engine, short, long):
    environment = {"ENGINE": engine} | many({}, {"BACKEND": "inductor"} if engine == "compiled" else {"WHOLE": "1"})
    expected, seconds = reference(**environment)
    for i in range(many(short, long)):
        out = tmp_path / str(i)
        run = start(out, **environment)
        time.sleep(draw.uniform(0, seconds))
        run.kill()
        assert start(out, **environment).wait() == 0
        assert content(out) == expected
        tried[f"kills ({engine})"] += 1


def test_killed_again_and_again(start, reference, many, tried, draw, tmp_path):
    """A cell that is killed twice at one step counts as failed, and is trained again when asked."""
    expected, seconds = reference()
    for i in range(many(1, 10)):
        out = tmp_path / str(i)
        for _ in range(3):
            run = start(out, "--retry-failed")
            time.sleep(draw.uniform(0.3, 1) * seconds)
            run.kill()
            tried["kills in a row"] += 1
        assert start(out, "--retry-failed").wait() == 0
        assert content(out) == expected


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_told_to_end(start, reference, many, tried, draw, tmp_path, number, status):
    expected, _ = reference()
    for i in range(many(1, 20)):
        out = tmp_path / str(i)
        run = start(out)
        until(lambda out=out: list(out.glob("cells/*/*.snapshots/0*")))
        time.sleep(draw.uniform(0, 0.2))
        _send(run, number)
        assert run.wait(30) in (status, 0)
        assert start(out).wait() == 0
        assert content(out) == expected
        tried["signals"] += 1


def test_interrupted_while_it_starts(start, tmp_path, draw, tried, many):
    for i in range(many(2, 20)):
        run = start(tmp_path / str(i))
        time.sleep(draw.uniform(0.05, 0.6))
        _send(run, signal.SIGINT)
        assert run.wait(30) in (130, -signal.SIGINT)
        tried["signals"] += 1


def test_the_time_is_over(start, reference, tried, tmp_path):
    expected, _ = reference()
    out = tmp_path / "study"
    run = start(out, "--max-minutes", "0.01")
    assert run.wait(30) == 75
    assert "the time is over: leaving at a checkpoint" in run.text
    assert start(out).wait() == 0
    assert content(out) == expected
    tried["time limits"] += 1


def _send(run, number):
    if run.process.exitcode is None:
        os.kill(run.process.pid, number)
