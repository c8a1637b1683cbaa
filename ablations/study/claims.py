"""Who works on what: claims let any number of processes, on any machines that share the folder, do one study.

The claim of PATH is the file PATH.claim-N of the highest N, made exclusively; its time of change is its heartbeat. One
that has stopped is taken over by making N + 1, which only one process can, so that no claim has two owners.
"""

import errno
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from threading import Event, Thread
from typing import Any
from uuid import uuid4

from ablations.study import schema
from core import files

BEAT, SILENCE = 5.0, 60.0  # seconds between heartbeats; after which a claim without one is free
PAUSE = 0.5  # seconds between two looks at what others have
PATIENCE = 2.0  # seconds of waiting after which it is said for whom


class Lost(Exception):
    """Another process took a claim over while this one did not show that it was alive."""


class Claim:
    """A claim of this process. died: how many owners died before it since the work last advanced."""

    def __init__(self, what: Path, path: Path, died: int, token: str) -> None:
        self._what, self._path, self.died, self._token = what, path, died, token
        self._left = False

    def leave(self) -> None:
        """Do not give it back: one of the processes that did the work together has died, and that counts."""
        self._left = True

    def check(self) -> None:
        """Lost, if it is another process's by now."""
        if _newest(self._what) != self._path or _read(self._path).get("token") != self._token:
            why = f"its claim was removed, or taken over after {SILENCE:.0f} s in which this one had stopped"
            raise Lost(f"{self._what} is not this process's any more: {why}")


@contextmanager
def claimed(what: Path, reached: int = 0) -> Iterator[Claim | None]:
    """The claim of `what`, given back at the end; None if someone has it.

    reached: how far the work is. An owner that died further back than that does not count.
    """
    claim = _take(what, reached)
    if claim is None:
        yield None
        return
    over = Event()
    thread = Thread(target=_beat, args=(claim._path, over), daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # of no thread more
        claim._path.unlink(missing_ok=True)
        raise OSError(errno.EAGAIN, "no thread can be started to show that this process works on it", what) from error
    try:
        yield claim
    finally:
        over.set()
        thread.join()
        with suppress(Lost):
            claim.check()
            if not claim._left:
                claim._path.unlink(missing_ok=True)


@contextmanager
def waited(what: Path) -> Iterator[None]:
    """The same, as soon as nobody else has it."""
    for _ in _pauses(lambda: _newest(what)):
        with claimed(what) as claim:
            if claim is not None:
                yield
                return


def wait(held: Callable[[], Path | None]) -> None:
    """Until there is no such claim."""
    for _ in _pauses(held):
        if held() is None:
            return


def _pauses(held: Callable[[], Path | None]) -> Iterator[None]:
    """At once, and after every pause; it is said once what claim is waited for."""
    begin, said = time.monotonic(), False
    while True:
        yield
        if not said and time.monotonic() - begin >= PATIENCE and (path := held()):
            print(f"waiting: {described(path)}", file=sys.stderr, flush=True)
            said = True
        time.sleep(PAUSE)


def described(path: Path) -> str:
    """Whose a claim is, and how to go on without it."""
    content = _read(path)
    name = content.get("host", "").partition(" ")[0]
    who = f"process {content['pid']} on {name!r}" if content else "a process that it does not name"
    return (
        f"'{path}' is the claim of {who}; it is free when that ends or shows nothing for {SILENCE:.0f} s. If no such "
        "process runs, remove the file"
    )


def taken(what: Path) -> bool:
    """Whether someone has the claim and is alive."""
    return holder(what) is not None


def holder(what: Path) -> Path | None:
    """The claim of someone who is alive."""
    path = _newest(what)
    return None if path is None or _dead(path) else path


def clear(what: Path) -> None:
    """Remove the claim of a process that died, where nothing is left to do."""
    if (path := _newest(what)) and _dead(path):
        _remove(path)


def working_here(out: Path) -> Path | None:
    """The claim by which a process of this machine has a cell of the study."""
    claims = (path for path in out.glob("cells/*/seed*.claim-*") if _read(path).get("host") == host())
    return next((path for path in claims if not _dead(path)), None)


def host() -> str:
    """This machine, and on Linux since when it runs, for another may have its name, and the space in which its process
    ids hold."""
    try:
        since = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {since} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _take(what: Path, reached: int) -> Claim | None:
    files.folder(what.parent)
    old, died, number = _newest(what), 0, 0
    if old is not None:
        if not _dead(old):
            return None
        before, number = _read(old), _number(old)
        died = before["died"] + 1 if before and reached <= before["reached"] else 1
    path, token = what.with_name(f"{what.name}.claim-{number + 1}"), uuid4().hex
    content = {"host": host(), "pid": os.getpid(), "token": token, "reached": reached, "died": died}
    try:
        with path.open("x", encoding="utf-8") as file:
            json.dump(content, file)
    except FileExistsError:
        return None
    except OSError:
        path.unlink(missing_ok=True)
        raise
    if _newest(what) != path:  # others were taken and given back in between
        path.unlink()
        return None
    if old is not None:
        _remove(old)
    return Claim(what, path, died, token)


def _remove(path: Path) -> None:
    with suppress(OSError):  # of a folder with something in it, which is in nobody's way
        files.remove(path)


def _beat(path: Path, over: Event) -> None:
    while not over.wait(BEAT):
        with suppress(OSError):  # gone: `check` tells
            os.utime(path)


def _newest(what: Path) -> Path | None:
    return max(what.parent.glob(f"{escape(what.name)}.claim-*"), key=_number, default=None)


def _number(path: Path) -> int:
    end = path.name.rpartition("-")[2]
    return int(end) if end.isdecimal() and len(end) < 19 else 0


def _read(path: Path) -> dict[str, Any]:
    """What a claim says; {} where it is being written, given back or damaged."""
    try:
        return schema.read(path, schema.ClaimFile)
    except schema.Damaged:
        return {}


def _dead(path: Path) -> bool:
    """Whether a claim's owner does not run on this machine any more, or its heartbeat has stopped, or is of a time to
    come: the clock was set back."""
    content = _read(path)
    if content.get("host") == host() and not _running(content["pid"]):
        return True
    try:
        with tempfile.NamedTemporaryFile(prefix=".clock-", dir=path.parent) as now:  # by the file system's clock
            return abs(os.fstat(now.fileno()).st_mtime - path.lstat().st_mtime) > SILENCE
    except FileNotFoundError:  # given back just now
        return False


def _running(pid: int) -> bool:
    """Whether a process is there and is not dead without its parent's notice."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # another user's; or no /proc
        return True
