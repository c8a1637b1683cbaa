"""Claims: one owner at a time, whoever dies."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from ablations.study import claims


def other(what, number=1, **content):
    """A claim that someone else made."""
    path = what.with_name(f"{what.name}.claim-{number}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "token": "theirs", "reached": 0, "died": 0} | content))
    return path


def test_one_owner_and_nothing_left(tmp_path):
    what = tmp_path / "arm" / "seed0"
    with claims.claimed(what) as mine:
        assert mine is not None
        mine.check()
        assert claims.taken(what)
        with claims.claimed(what) as again:
            assert again is None
    assert not claims.taken(what)
    assert list(what.parent.iterdir()) == []


def test_of_many_at_once_one_gets_it(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        made = [c for c in pool.map(lambda _: claims._take(tmp_path / "seed0", 0), range(64)) if c]
    assert len(made) == 1


@pytest.mark.parametrize("end", ["9" * 243, "x", "\u0663"])
def test_a_claim_of_another_name_is_taken_over(tmp_path, end):
    os.utime(other(tmp_path / "seed1", end), (0, 0))
    with claims.claimed(tmp_path / "seed1") as mine:
        assert mine is not None
        mine.check()


@pytest.mark.parametrize("name", ["seed0", "a*[b]?"])
def test_a_claim_elsewhere_is_free_when_its_heartbeat_has_stopped(tmp_path, name):
    what = tmp_path / name
    path = other(what)
    with claims.claimed(what) as mine:
        assert mine is None
    os.utime(path, (0, 0) if name == "seed0" else (2**33, 2**33))  # of a clock that was set back since
    with claims.claimed(what) as mine:
        assert mine.died == 1
        assert not path.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_claim_of_this_machine_is_free_when_its_process_is_gone(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    other(tmp_path / "seed0", host=claims.host(), pid=gone.pid)
    assert not claims.taken(tmp_path / "seed0")
    other(tmp_path / "seed1", host=claims.host(), pid=os.getpid())
    assert claims.taken(tmp_path / "seed1")
    assert claims.host().startswith(socket.gethostname())
    booted = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    other(tmp_path / "seed2", host=claims.host().replace(booted, "another"), pid=gone.pid)  # of a machine of this name
    assert claims.taken(tmp_path / "seed2")


def test_an_unread_parent_does_not_keep_a_dead_process_alive(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert dead.stdout.read() == b""
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
    other(tmp_path / "seed0", host=claims.host(), pid=dead.pid)
    assert not claims.taken(tmp_path / "seed0")
    dead.wait()


def test_without_a_thread_nothing_is_claimed(tmp_path, monkeypatch):
    def none(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(claims.Thread, "start", none)
    with pytest.raises(OSError, match="no thread can be started"), claims.claimed(tmp_path / "x"):
        pass
    assert not [*tmp_path.iterdir()]


def test_an_owner_that_slept_learns_that_it_lost(tmp_path, monkeypatch):
    what = tmp_path / "seed0"
    with claims.claimed(what) as slow:
        other(what, 2)
        with pytest.raises(claims.Lost, match="not this process's any more: its claim was removed, or taken over"):
            slow.check()
    assert claims.taken(what), "what is another's is not given back"


def test_deaths_count_while_the_work_does_not_advance(tmp_path):
    what = tmp_path / "seed0"
    for died, reached in ((1, 0), (2, 0), (1, 5), (2, 5), (1, 6)):
        for path in tmp_path.glob("seed0.claim-*"):
            content = json.loads(path.read_text())
            path.write_text(json.dumps(content | {"host": "elsewhere"}))
            os.utime(path, (0, 0))
        if not list(tmp_path.iterdir()):
            os.utime(other(what), (0, 0))
        assert claims._take(what, reached).died == died  # and dies itself


@pytest.mark.parametrize(
    ("make", "who"),
    [
        (lambda path: None, "of process 1 on 'elsewhere'"),
        (lambda path: path.write_bytes(b"{"), "of a process that it does not name"),
        (lambda path: (path.unlink(), path.symlink_to("nowhere")), "of a process that it does not name"),
    ],
)
@pytest.mark.parametrize("wait", [claims.waited, lambda what: nullcontext(claims.wait(lambda: claims.holder(what)))])
def test_it_is_said_once_what_is_waited_for(tmp_path, monkeypatch, capsys, make, who, wait):
    path, clock = other(tmp_path / "study"), [0.0]
    make(path)

    def sleep(seconds):
        clock[0] += seconds
        if clock[0] > 5:
            path.unlink()

    monkeypatch.setattr(claims, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0]))
    with wait(tmp_path / "study"):
        pass
    (told,) = capsys.readouterr().err.splitlines()
    assert f"'{path}' is the claim {who}" in told
    assert told.endswith("If no such process runs, remove the file")


def test_a_folder_of_a_claims_name_is_let_be_and_in_nobodys_way(tmp_path):
    (mine := tmp_path / "seed0.claim-3" / "mine").mkdir(parents=True)
    os.utime(mine.parent, (0, 0))
    for _ in range(2):
        with claims.claimed(tmp_path / "seed0") as claim:
            assert claim is not None
            claim.check()
    claims.clear(tmp_path / "seed0")
    assert [*tmp_path.iterdir()] == [mine.parent]


def test_a_damaged_claim_is_free_when_it_is_old(tmp_path):
    path = other(tmp_path / "seed0")
    forged = [{"host": claims.host(), "pid": pid, "token": "", "reached": 0, "died": 0} for pid in (None, "1", 10**30)]
    for damage in (b"", b"[]", b"\xff", b'{"host', *(json.dumps(claim).encode() for claim in forged)):
        path.write_bytes(damage)
        os.utime(path)
        assert claims.taken(tmp_path / "seed0")
        os.utime(path, (0, 0))
        assert not claims.taken(tmp_path / "seed0")
