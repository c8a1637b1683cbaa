"""What makes the cells of a study comparable: digests of the code, the data and the weights that they come from."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.code import ran
from core.data.splits import Data
from core.weights import pretrained

_ROOT = Path(__file__).parents[2]
_SOURCES = ("core", "ablations/study")  # what a cell is computed by; a report may be made by later code

Identity = dict[str, str | None]


def of(data: Data, weights: str | None) -> Identity:
    """SHA-256 of the sources, of the data and of the pretrained weights (None without any)."""
    return {
        "code": code(),
        "data": data.digest(),
        "weights": None if weights is None else pretrained.load(weights).digest(),
    }


def code() -> str:
    """SHA-256 of this project's source files, whatever is committed of them, by name, installed without git too; and of
    the user's files that were run."""
    found = hashlib.sha256()
    own = sorted(path for part in _SOURCES for path in (_ROOT / part).rglob("*.py"))
    for path in [*own, *sorted(ran, key=lambda path: path.name)]:
        content = path.read_bytes()
        name = path.name if path in ran else path.relative_to(_ROOT).as_posix()
        found.update(f"{name} {len(content)}\n".encode() + content)
    return found.hexdigest()


def differences(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> list[str]:
    """`code 1a2b3c4d5e6f -> …`, of each that is another; an identity that was not recorded is unknown."""
    old, new = ({} if of is None else of for of in (before, after))
    return [
        f"{k} {_short(old, k)} -> {_short(new, k)}" for k in ("code", "data", "weights") if old.get(k) != new.get(k)
    ]


def _short(identity: Mapping[str, Any], key: str) -> str:
    return "unknown" if key not in identity else str(identity[key])[:12]
