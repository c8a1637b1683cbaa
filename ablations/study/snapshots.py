"""Snapshots of a cell while it trains: its last two, from which the same command continues after whatever ended it.

A snapshot is one safetensors file: tensors, and JSON among its metadata. Its name is the step and the SHA-256 of its
content: what is torn or flipped does not have its name. It is written aside, synced and renamed.
"""

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from itertools import chain, count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ablations.study import schema
from core import files

EVERY, SHARE = 30.0, 0.01  # seconds between snapshots at least, and their share of the time at most
SPEED = 2e8  # bytes a second at which the first is expected to be written

Content = tuple[dict[str, Tensor], dict[str, Any]]


class Snapshots:
    """The snapshots of a cell, in the folder beside its own. of: whose they are, which each says of itself: arm, seed,
    and what made it. note: takes what is to be told."""

    def __init__(self, cell: Path, of: Mapping[str, Any], note: Callable[[str], None]) -> None:
        self.folder = folder_of(cell)
        self._of, self._note = json.loads(json.dumps(of)), note
        self._last, self._cost = time.monotonic(), 0.0

    def begin(self, size: int) -> None:
        """Count the time to the next one, of about so many bytes, from now on."""
        self._last, self._cost = time.monotonic(), size / SPEED

    def due(self) -> bool:
        """Whether it is time for one."""
        return time.monotonic() - self._last >= max(EVERY, self._cost / SHARE)

    def save(self, step: int, content: Callable[[], Content]) -> None:
        """Write one, and remove all but the last two. OSError (ENOSPC) if the disk has no room for it."""
        begin = time.monotonic()
        tensors, about = content()
        tensors = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}  # none shared
        data = save(tensors, metadata={"of": json.dumps(self._of), "about": json.dumps(about)})
        if self.folder.is_symlink() or not self.folder.is_dir():
            files.remove(self.folder)
            self.folder.mkdir(parents=True)
        if files.room(self.folder) < len(data):
            size = f"{len(data) / 2**20:,.1f} MiB"
            raise OSError(errno.ENOSPC, f"no room for a snapshot of {size}; the same command continues", self.folder)
        for left in self._torn():
            files.remove(left)
        files.write(self.folder / f"{step:09d}-{_digest(data)}.safetensors", data)
        for path in _paths(self.folder)[:-2]:
            files.remove(path)
        self._last = time.monotonic()
        self._cost = self._last - begin

    def load(self, check: Callable[[dict[str, Tensor], dict[str, Any]], None] = lambda *_: None) -> Content | None:
        """The last one that is whole and of this cell; None if there is none. Damaged ones are told of and removed,
        those of another cell told of and set aside. check: raises ValueError for what no snapshot of it can hold.

        Raises Unread, or OSError for the folder, where the system does not let them be read: they may be whole.
        """
        for path in reversed(_paths(self.folder)):
            try:
                data = schema.content(path)
                if _digest(data) != path.stem.partition("-")[2]:
                    raise ValueError("its content does not have its checksum")
                length = int.from_bytes(data[:8], "little")
                said = json.loads(data[8 : 8 + length])["__metadata__"]
                of, content = json.loads(said.get("of", "{}")), (load(data), json.loads(said["about"]))
                if of == self._of:
                    check(*content)
                    return content
            except schema.Unread:
                raise
            except (ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
                self._note(
                    f"snapshot {path} is damaged ({schema.said(error)}): the one before it is used, or the cell starts "
                    "again"
                )
                with suppress(OSError):  # of a folder that is not ours
                    files.remove(path)
                continue
            aside = _aside(self.folder)
            aside.mkdir(exist_ok=True)
            odd = (f"{k} {of.get(k)} -> {mine}" for k, mine in self._of.items() if of.get(k) != mine)
            self._note(f"snapshot {path} is of another cell ({', '.join(odd)}): set aside in {aside}")
            path.replace(aside / path.name)
        return None

    def remove(self) -> None:
        """Remove them all: the cell has its result. What else is in their folder stays, and so the folder."""
        with suppress(OSError):
            for path in [*_paths(self.folder), *self._torn()]:
                files.remove(path)
            files.remove(self.folder)

    def _torn(self) -> Iterable[Path]:
        """By processes that were killed while they wrote."""
        return self.folder.glob(".*.partial")


def _aside(folder: Path) -> Path:
    """Where those of another cell go: beside what is there and no folder, for that is not ours."""
    names = chain([".set-aside"], (f".set-aside-{i}" for i in count(2)))
    paths = map(folder.with_suffix, names)
    return next(path for path in paths if path.is_dir() or not os.path.lexists(path))


def folder_of(cell: Path) -> Path:
    """Where the snapshots of a cell's folder lie: beside it, for what a cell wrote is removed when it begins again."""
    return cell.with_name(f"{cell.name}.snapshots")


def reached(cell: Path) -> int:
    """The step of the last snapshot; 0 without one."""
    paths = _paths(folder_of(cell))
    return int(paths[-1].name[:9]) if paths else 0


def _paths(folder: Path) -> list[Path]:
    """In a folder of ours: what a link leads to is not. OSError if nobody may look into it."""
    there = [] if folder.is_symlink() or not folder.is_dir() else folder.iterdir()
    return sorted(path for path in there if fnmatch(path.name, f"{'[0-9]' * 9}-*.safetensors"))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
