"""What makes the cells of a study comparable: digests of the code, the data and the weights that they come from."""

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from core import files, model
from core.code import imported, ran
from core.data.splits import Data
from core.errors import InputError
from core.foreign.model import Foreign, trained
from core.weights import pretrained

_SOURCES = ("core", "ablations/study")  # what a cell is computed by; a report may be made by later code

Identity = dict[str, str | None]


def of(data: Data, weights: str | None, config: model.Config, own: Sequence[str]) -> Identity:
    """SHA-256 of the code, of the data, and of the pretrained weights (None without any), or what a model of others
    begins with at seed 0. own: the user's files that were run."""
    begin = None if weights is None else pretrained.load(weights).digest()
    packages: list[tuple[str, str]] = []
    if isinstance(config, Foreign):
        begin = files.digests(model.state_dict(config, trained(config.module)))
        packages = _packages(config.module)
    return {"code": code(own, packages), "data": data.digest(), "weights": begin}


def _packages(module: nn.Module) -> list[tuple[str, str]]:
    """What a model of others is written in, besides torch, whose version makes a study another: name and version."""
    names = {type(part).__module__.partition(".")[0] for part in module.modules()} - {"torch"}
    found = ((name, getattr(sys.modules.get(name), "__version__", None)) for name in sorted(names))
    return [(name, str(version)) for name, version in found if version]


def code(own: Sequence[str] = (), packages: Sequence[tuple[str, str]] = ()) -> str:
    """SHA-256 of this project's source files as they were loaded, whatever is committed of them, by name, installed
    without git too; of these files of the user's and those that they import; and of these packages by version.
    InputError for a file that was changed since this process ran it."""
    given = [Path(os.path.realpath(file)) for file in own]
    paths = list(dict.fromkeys(chain(given, *(imported.get(path, ()) for path in given))))
    if odd := [path for path in paths if not path.is_file() or _digest(path) != ran.get(path)]:
        raise InputError(f"'{odd[0]}' was changed since this process ran it; start the command, or Python, anew")
    listed = [*_OWN, *packages, *sorted((path.name, ran[path]) for path in paths)]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def sources(root: Path) -> list[tuple[str, str]]:
    """This project's source files below a folder: name and SHA-256."""
    paths = sorted(path for part in _SOURCES for path in (root / part).rglob("*.py"))
    return [(path.relative_to(root).as_posix(), _digest(path)) for path in paths]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


_OWN = sources(Path(__file__).parents[2])


def differences(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> list[str]:
    """`code 1a2b3c4d5e6f -> …`, of each that is another; an identity that was not recorded is unknown."""
    old, new = ({} if of is None else of for of in (before, after))
    return [
        f"{k} {_short(old, k)} -> {_short(new, k)}" for k in ("code", "data", "weights") if old.get(k) != new.get(k)
    ]


def _short(identity: Mapping[str, Any], key: str) -> str:
    return "unknown" if key not in identity else str(identity[key])[:12]
