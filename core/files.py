"""Files that are written whole or not at all, and digests that tell whether what is read is what was written."""

import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from core.errors import InputError

_PIECE = 1 << 26  # elements


def write(path: Path, content: bytes) -> None:
    """Give a file this content: on the disk when this returns, and until then what it was. OSError names the file;
    InputError for a folder in its place."""
    refuse_folder(path)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.partial")  # processes of two machines may have one number
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:  # whatever ends it, a signal too
        temporary.unlink(missing_ok=True)


def refuse_folder(path: Path) -> None:
    """InputError for a folder where a file has to be, or a device: what is written would take its place."""
    if path.exists() and not path.is_file() and not (path.is_dir() and path.is_symlink()):
        what = "a folder" if path.is_dir() else "a device or a pipe"
        raise InputError(f"'{path}' is {what}, where a file has to be; move it")


def folder(path: Path) -> None:
    """Make a folder, and those above it, unless it is there. InputError for what is there and no folder."""
    clear(path)
    path.mkdir(parents=True, exist_ok=True)


def clear(path: Path) -> None:
    """InputError if there cannot be a folder, for something else is there or above it."""
    if (at := next(filter(os.path.lexists, (path, *path.parents)), None)) and not os.path.isdir(at):
        what = "a link to nothing" if not at.exists() else "a file"
        raise InputError(f"'{at}' is {what}, where a folder has to be; move it, or pass another --out or --data-root")


def remove(path: Path) -> None:
    """Remove what is there: a file, a link (not what it points to), or nothing. OSError for a folder that has something
    in it: no file of ours."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make a file, or the renames in a folder, outlast a loss of power; a folder where the file system can, as shared
    folders of virtual machines cannot."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(handle)


def room(path: Path) -> int:
    """Bytes that are free on the file system of a file; no end of them where that does not tell its size (ramfs, some
    of a network)."""
    disk = shutil.disk_usage(path)
    return disk.free if disk.total else sys.maxsize


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and values; a piece at a time, for the sake of memory maps."""
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    for piece in tensor.detach().flatten().split(_PIECE):
        found.update(piece.cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def digests(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors by name, in any order."""
    lines = sorted(f"{digest(tensor)} {name}\n" for name, tensor in tensors.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()
