"""Sizes of memory: as one writes them, and whether this machine has so much."""

import os
import re
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from core.errors import InputError

_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def read_bytes(text: str) -> int:
    """ "24GiB" -> 25769803776; InputError for what is no size above 0, or has no unit."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([kmgt]i?)b?", text.strip().lower())
    size = float(match[1]) * _UNITS[match[2]] if match else 0
    if not 1 <= size < 2**63:
        raise InputError(f"budget '{text}' is no size; write a number and a unit, such as 24GiB or 512MB")
    return int(size)


def memory(device: str) -> int:
    """Bytes of the GPU, or of this machine: those that limits (ulimit -v, a container's, a Slurm job's) leave this
    process."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    own = [] if limit == resource.RLIM_INFINITY else [limit]
    return min([physical, *own, *of_groups()])


def of_groups(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Bytes that this process's control groups, and those above them, may have, of version 2 and 1 (Linux's
    Documentation/admin-guide/cgroup-v2.rst)."""
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, kind, path = line.split(":", 2)
        top, name = (root, "memory.max") if not kind else (root / "memory", "memory.limit_in_bytes")
        at = top / path.strip("/")
        for folder in (at, *at.parents) if kind in ("", "memory") else ():
            with suppress(OSError, ValueError):  # no such file; "max"
                yield int((folder / name).read_text())


def need(size: int, what: str, instead: str, device: str = "cpu") -> None:
    """InputError, which says what to do instead, for what takes more memory than there is."""
    if size > (have := memory(device)):
        needs, has = (f"{of / 2**30:,.1f}" for of in (size, have))
        raise InputError(f"{what} needs {needs} GiB of memory, and this machine has {has}; {instead}")
