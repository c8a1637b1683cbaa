"""A study's folder: where what lies, and the one place that writes and removes.

study.json, cells/ARM/seedK/ (what cannot be made again) and report/ (what can). Nothing outside the last two is ever
removed.
"""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ablations.study import claims, schema
from ablations.study import identity as identities
from ablations.study.arms import read_settings
from ablations.study.machine import COMPARABLE
from core import files
from core.errors import InputError

Result = dict[str, Any]
Row = dict[str, float]


def cell_folder(out: Path, arm: str, seed: int) -> Path:
    """Where a cell is kept."""
    return out / "cells" / arm / f"seed{seed}"


def changing(out: Path) -> AbstractContextManager[None]:
    """Within, no other process writes a study's own files: study.json, timing.json, margins.json."""
    return claims.waited(out / "study")


def refuse_shared(cells: Iterable[Path]) -> None:
    """InputError if two arms of these cells' folders are one folder, by a link: each would replace the other's."""
    found: dict[str, Path] = {}
    for arm in (cell.parent for cell in cells):
        if (other := found.setdefault(os.path.realpath(arm), arm)) != arm:
            raise InputError(f"'{arm}' and '{other}' are one folder; remove the one that is a link")


def profile_folder(out: Path, arm: str) -> Path:
    """Where an arm's profile is kept."""
    return out / "cells" / arm / "profile"


def write_text(path: Path, text: str) -> None:
    """Replace a file's content atomically, in UTF-8."""
    files.write(path, text.encode(errors="backslashreplace"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file atomically, sealed with the digest of its content."""
    write_text(path, json.dumps(schema.sealed(value), indent=2) + "\n")


def write_tokens(folder: Path, images: Tensor, patches: Tensor) -> None:
    """Write how a cell cuts images: uint8 [B,C,S,S], and the patches of each [B,L,3] (x0, y0, size)."""
    write_arrays(folder / "tokens.npz", images=images, patches=patches)


def write_arrays(path: Path, **tensors: Tensor) -> None:
    """Replace an archive of arrays by name (numpy's npz) atomically."""
    content = BytesIO()
    arrays: dict[str, Any] = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    np.savez_compressed(content, **arrays)
    files.write(path, content.getvalue())


def write_result(folder: Path, result: Result) -> None:
    """Write a cell's result, which makes it a finished one: after all of its other files, whose digests it has."""
    beside = {name: schema.digest((folder / name).read_bytes()) for name in schema.BESIDE}
    write_json(folder / "result.json", result | {"files": beside})


def read_study(out: Path) -> dict[str, Any]:
    """The content of study.json. InputError if there is none, or if it is damaged: nothing tells then what the cells
    are of."""
    path = out / "study.json"
    if not path.is_file():
        _refuse_lost(out)
        raise InputError(f"'{out}' holds no study (no study.json); pass a folder that ablations/run.py wrote")
    refuse_old(out)
    try:
        return schema.read(path, schema.StudyFile)
    except schema.Damaged as error:
        raise InputError(f"{error}; restore it, or train again: python ablations/run.py --out {out}-again") from error


def open_study(out: Path, made: Mapping[str, Any], accept: bool = False) -> None:
    """Create a study's folder, or continue it. InputError if its cells were made by another recipe, torch or machine,
    for they could not be compared; and, unless accepted, if by other code, data or weights.

    made: study.json as it would be now; of one that goes on, the identity and what comes with it are kept."""
    for part in ("cells", "report"):
        files.clear(out / part)
    for name in ("study.json", "timing.json", "margins.json"):
        files.refuse_folder(out / name)  # before hours, after which it could not be written
        for left in out.glob(f".{name}.*.partial"):  # by a process that was killed: who writes them has one claim
            files.remove(left)
    path = out / "study.json"
    if not path.is_file():
        _refuse_lost(out)
        if out.exists() and any(not _own(entry) for entry in out.iterdir()):
            raise InputError(f"'{out}' is not empty and holds no study; pass another --out")
        files.folder(out)
        write_json(path, made)
        return
    study = read_study(out)
    before, after = (
        of | {k: machine[k] for k in COMPARABLE}
        for of, machine in (
            (schema.whole(study["configuration"]), study["environment"]),
            (made["configuration"], made["environment"]),
        )
    )
    refuse_other(out, before, after)
    if (changed := identities.differences(study.get("identity"), made["identity"])) and not accept:
        raise InputError(
            f"the cells of '{out}' were made by others than now ({', '.join(changed)}); pass another --out, go back to "
            "those, or go on with --accept-changes: every cell keeps what it was made by, and the report tells"
        )
    parameters = ({} if changed else study.get("parameters", {})) | made["parameters"]
    known = {"identity": made["identity"], "parts": made["parts"], "parameters": parameters}
    if study | known != study:
        write_json(path, study | known)


def _refuse_lost(out: Path) -> None:
    """InputError for cells whose study.json is gone."""
    if (out / "cells").is_dir():
        raise InputError(
            f"'{out / 'study.json'}' is gone, which tells what the cells beside it are of; restore it, or train again: "
            f"python ablations/run.py --out {out}-again"
        )


def refuse_other(out: Path, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """InputError for other settings than those of the study in a folder (before)."""
    if odd := differing(before, after):
        changes = ", ".join(f"{k} {before.get(k)!r} -> {after.get(k)!r}" for k in odd)
        raise InputError(f"'{out}' holds a study with other settings ({changes}); pass another --out, or the same")


def differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The settings that are not the same: parameters of optimizations count in any order, the last one of each."""

    def plain(of: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return {**of, "set": read_settings(of["set"])} if of.get("set") else dict(of)
        except InputError:  # written by hand: no setting of ours
            return dict(of)

    if before.get("set") != after.get("set"):
        before, after = plain(before), plain(after)
    return [k for k in {**before, **after} if before.get(k) != after.get(k)]


def _own(entry: Path) -> bool:
    """Whether an entry of a study's folder is what a start that was cut short leaves."""
    return entry.name.startswith((".study.json.", "study.claim-", ".clock-"))


def refuse_old(out: Path) -> None:
    """InputError for a study whose cells lie beside its study.json."""
    if not (out / "cells").is_dir() and any(out.glob("*/seed*/result.json")):
        raise InputError(
            f"'{out}' is a study of an earlier version: its cells lie beside study.json, not in cells/, and their "
            f"memory and FLOPs were counted otherwise; train it again: python ablations/run.py --out {out}-again"
        )
