"""Sizes of memory: as one writes them, and whether this machine has so much."""

import os
import re
import resource

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
    """Bytes of the GPU, or of this machine: those that its limit (ulimit -v) leaves this process."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return physical if limit == resource.RLIM_INFINITY else min(physical, limit)


def need(size: int, what: str, instead: str, device: str = "cpu") -> None:
    """InputError, which says what to do instead, for what takes more memory than there is."""
    if size > (have := memory(device)):
        needs, has = (f"{of / 2**30:,.1f}" for of in (size, have))
        raise InputError(f"{what} needs {needs} GiB of memory, and this machine has {has}; {instead}")
