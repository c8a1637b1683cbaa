"""Folders of images, decoded once into memory maps. All of it can be made again: what is damaged is, and what is of no
use is removed."""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from core import files
from core.data import pictures
from core.data.splits import Statistics, statistics
from core.errors import InputError

_FORMAT = 6
_PARTS = ("train", "val")
_DECODING = ".decoding-"
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError, MemoryError, OverflowError)
_FRESH = 60.0  # seconds in which a folder may be another process's that does not hold it yet


class Decoded(NamedTuple):
    """Images of both splits, uint8 [N,3,S,S], on disk and read when they are used; the digests of these; the training
    images' statistics; and which image, of the training and then validation ones, is the same as which earlier one."""

    train: Tensor
    val: Tensor
    digests: tuple[str, str]
    known: Statistics
    copies: list[tuple[int, int]]


def cached(path: Path, parts: Sequence[Sequence[str]], state: object, root: Path, image: int | None) -> Decoded:
    """The files of train and val below `path`, decoded at this side (None: as they are) or found in the cache.

    state: whatever must not have changed of them since. InputError for what cannot be decoded.
    """
    source = {"path": str(path.resolve()), "image": image}
    code = hashlib.sha256(repr((_FORMAT, source, state)).encode()).hexdigest()[:16]
    folder = root / "cache" / f"{path.resolve().name}-{code}"
    try:
        return _read(folder)
    except _UNREADABLE:
        pass  # not there, or damaged: decoded anew
    files.folder(folder.parent)
    _remove_leftovers(folder.parent)
    with _decoding(folder.parent) as temporary:
        side = image or pictures.native(parts[0][0])
        for name, of in zip(_PARTS, parts, strict=True):
            pictures.decode(of, side, image is None, temporary / f"{name}.npy")
        made = [_mapped(temporary / f"{name}.npy") for name in _PARTS]
        digests = [files.digest(images) for images in made]
        if digests[0] == digests[1]:
            raise InputError(f"'{path}' has the same images to learn and to judge by: a copy; hold out others")
        about = {"digests": digests, "statistics": statistics(made[0]), "copies": _copies(*made), **source}
        files.write(temporary / "about.json", json.dumps(about | {"sha256": _seal(about)}).encode())
        try:
            temporary.rename(folder)
        except OSError:  # another process was first, or what is there is damaged
            if _damaged(folder):
                shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
                temporary.rename(folder)
    _remove_stale(folder, source)
    return _read(folder)


def _read(folder: Path) -> Decoded:
    """ValueError where the images are not those that were decoded."""
    paths = [folder / "about.json", *(folder / f"{name}.npy" for name in _PARTS)]
    if not all(path.is_file() for path in paths):
        raise ValueError(f"'{folder}' lacks files")
    about = json.loads(paths[0].read_bytes())
    train, val = map(_mapped, paths[1:])
    digests = files.digest(train), files.digest(val)
    if list(digests) != about["digests"] or about["sha256"] != _seal(about):
        raise ValueError(f"'{folder}' is damaged")
    mean, std = about["statistics"]
    return Decoded(train, val, digests, (tuple(mean), tuple(std)), [(i, j) for i, j in about["copies"]])


def _copies(train: Tensor, val: Tensor) -> list[tuple[int, int]]:
    first: dict[bytes, int] = {}
    pairs = ((i, first.setdefault(_fingerprint(image), i)) for i, image in enumerate(chain(train, val)))
    return [(i, j) for i, j in pairs if i != j]


def _fingerprint(image: Tensor) -> bytes:
    return hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest()


def _seal(about: Mapping[str, object]) -> str:
    """SHA-256 of what is said of the images."""
    plain = {key: value for key, value in about.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _damaged(folder: Path) -> bool:
    try:
        _read(folder)
    except _UNREADABLE:
        return True
    return False


def _mapped(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path, mmap_mode="c"))


@contextmanager
def _decoding(cache: Path) -> Iterator[Path]:
    """A folder to decode into, held by this process, and gone in the end unless it was renamed."""
    temporary = cache / f"{_DECODING}{uuid4().hex}"
    temporary.mkdir()
    handle = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(handle)


def _remove_leftovers(cache: Path) -> None:
    """What killed processes were decoding: folders that no process holds."""
    for folder in cache.glob(f"{_DECODING}*"):
        with suppress(OSError):  # it is at work, or none
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                if time.time() - folder.stat().st_mtime > _FRESH:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
            finally:
                os.close(handle)


def _remove_stale(folder: Path, source: Mapping[str, object]) -> None:
    """Caches of the same folder at the same side as it was before."""
    for other in filter(Path.is_file, folder.parent.glob("*/about.json")):
        try:
            about = json.loads(other.read_bytes())
            same = {key: about[key] for key in source} == source
        except _UNREADABLE:
            continue  # of something else
        if same and other.parent != folder:
            shutil.rmtree(other.parent, ignore_errors=True)
