"""Sizes of memory as one writes them."""

import re

from core.errors import InputError

_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def read_bytes(text: str) -> int:
    """ "24GiB" -> 25769803776; InputError for what is no size above 0, or has no unit."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([kmgt]i?)b?", text.strip().lower())
    size = float(match[1]) * _UNITS[match[2]] if match else 0
    if not 1 <= size < 2**63:
        raise InputError(f"budget '{text}' is no size; write a number and a unit, such as 24GiB or 512MB")
    return int(size)
