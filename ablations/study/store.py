"""A study's folder: where what lies, and the one place that writes and removes.

study.json, cells/ARM/seedK/ (what cannot be made again) and report/ (what can). Nothing outside the last two is ever
removed.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from ablations.study.machine import COMPARABLE
from core.errors import InputError

Result = dict[str, Any]
Row = dict[str, float]


ANEW = "remove the folder and run the study again"


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Makes whatever a damaged file raises an InputError."""
    try:
        yield
    except (ValueError, KeyError, TypeError, EOFError, OSError, BadZipFile) as error:
        what = f"{type(error).__name__}: {error}"
        raise InputError(f"'{path}' cannot be read ({what}); restore it, or {ANEW}") from error


def cell_folder(out: Path, arm: str, seed: int) -> Path:
    """Where a cell is kept."""
    return out / "cells" / arm / f"seed{seed}"


def profile_folder(out: Path, arm: str) -> Path:
    """Where an arm's profile is kept."""
    return out / "cells" / arm / "profile"


def finished(folder: Path) -> bool:
    """Whether the cell has a result."""
    return (folder / "result.json").is_file()


def emptied(folder: Path) -> Path:
    """The folder of a cell or of a report, made anew without what it held."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def failed(folder: Path) -> bool:
    """Whether the cell was tried and has a failure instead of a result."""
    return (folder / "failed.json").is_file() and not finished(folder)


def synced(folder: Path) -> None:
    """Make a folder's files outlast a loss of power."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def open_study(out: Path, preset: str, recipe: dict[str, Any], versions: dict[str, str]) -> None:
    """Create a study's folder, or continue it. InputError if its cells were made by another recipe, torch or machine:
    they could not be compared."""
    path = out / "study.json"
    configuration = json.loads(json.dumps({"preset": preset, **recipe}))
    if path.is_file():
        refuse_old(out)
        with readable(path):
            study = json.loads(path.read_text())
            before = study["configuration"] | {k: study["environment"][k] for k in COMPARABLE}
        configuration |= {k: versions[k] for k in COMPARABLE}
        keys = [k for k in {**before, **configuration} if before.get(k) != configuration.get(k)]
        if keys:
            changes = ", ".join(f"{k} {before.get(k)!r} -> {configuration.get(k)!r}" for k in keys)
            raise InputError(f"'{out}' holds a study with other settings ({changes}); pass another --out, or the same")
        return
    if out.exists() and any(not entry.name.startswith((".study.json.", "study.claim-")) for entry in out.iterdir()):
        raise InputError(f"'{out}' is not empty and holds no study; pass another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, {"configuration": configuration, "environment": versions})


def refuse_old(out: Path) -> None:
    """InputError for a study whose cells lie beside its study.json."""
    if not (out / "cells").is_dir() and any(out.glob("*/seed*/result.json")):
        raise InputError(
            f"'{out}' is a study of an earlier version: its cells lie beside study.json, not in cells/, and their "
            f"memory and FLOPs were counted otherwise; train it again: python ablations/run.py --out {out}-again"
        )
