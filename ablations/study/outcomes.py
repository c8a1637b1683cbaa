"""A cell read back from its folder: finished, failed or damaged."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from itertools import pairwise
from math import isclose
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ablations.study import schema
from ablations.study.arms import optimizations, parse
from ablations.study.schema import Damaged, Unread
from ablations.study.store import Result, Row
from core import plugins
from core.errors import InputError


class Tokens(NamedTuple):
    """Images uint8 [B,C,S,S], and the patches that each is cut into, [B,L,3] (x0, y0, size)."""

    images: NDArray[np.uint8]
    patches: NDArray[np.int64]


@dataclass(frozen=True)
class Cell:
    """One arm at one seed: its result, its metrics by epoch, its folder, and whether each validation image was
    classified correctly after each epoch, [epochs, images]."""

    result: Result
    rows: list[Row]
    folder: Path
    correct: NDArray[np.bool_]

    @property
    def key(self) -> tuple[str, int]:
        """Arm and seed."""
        return self.result["arm"], self.result["seed"]

    @property
    def tokens(self) -> Tokens | None:
        """How it cuts images, where it does and this can be read."""
        try:
            return tokens(self.folder / "tokens.npz")
        except Damaged:  # or none
            return None


def finished(folder: Path) -> bool:
    """Whether the cell has a result, and what belongs to it, undamaged. Unread if that cannot be told."""
    return (folder / "result.json").is_file() and damage(folder) is None


def failed(folder: Path) -> bool:
    """Whether the cell was tried and has a failure instead of a result. Unread if that cannot be told."""
    try:
        own(folder / "failed.json", schema.Failure)
    except Unread:
        raise
    except Damaged:  # or none
        return False
    return not finished(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a cell that has a result; None where nothing is. Unread if one cannot be read:
    it may be whole."""
    return _damage(folder, tuple(_state(folder / name) for name in ("result.json", *schema.BESIDE)))


def _state(path: Path) -> tuple[int, ...] | None:
    """What tells what a file holds from what it held; None without one, such as of a cell that others begin again."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


@cache
def _damage(folder: Path, state: object) -> str | None:
    """The same of files in this state: read once, for a run asks of all its cells again and again."""
    try:
        read(folder)
    except Unread:
        raise
    except Damaged as error:
        return str(error)
    return None


def read(folder: Path) -> Cell:
    """The cell in a folder. Damaged if one of its files is not what was written, or not of this cell."""
    result = own(folder / "result.json", schema.Outcome)
    for name, known in result.get("files", {}).items():
        if schema.digest(schema.content(folder / name)) != known:
            raise Damaged(f"'{folder / name}' is not as it was written")
    rows = _rows(folder / "metrics.jsonl", result["epochs"])
    for name, value in _summed_up(rows).items():
        if not isclose(result[name], value, rel_tol=1e-6):
            raise Damaged(f"'{folder / 'result.json'}' has another {name} than metrics.jsonl")
    return Cell(result, rows, folder, _correct(folder / "correct.npz", rows))


def _summed_up(rows: Sequence[Row]) -> Row:
    """What a result says of its epochs."""
    last = rows[-1]
    return {
        "best_val_accuracy": max(row["val/accuracy"] for row in rows),
        "final_val_accuracy": last["val/accuracy"],
        "final_val_loss": last["val/loss"],
        "final_train_loss": last["train/loss"],
        "train_seconds": last["seconds"],
    }


def own(path: Path, kind: type[schema.Checked]) -> Result:
    """What a file of a cell says. Damaged if that is of another one."""
    found = schema.read(path, kind)
    if (found["arm"], f"seed{found['seed']}") != (path.parent.parent.name, path.parent.name):
        raise Damaged(f"'{path}' is of another cell ({found['arm']}, seed {found['seed']})")
    check_arm(path, found["arm"])
    return found


def check_arm(path: Path, arm: str) -> None:
    """Damaged, for what a file says, if the program writes no such arm; of optimizations that are not registered here
    it is not told."""
    if plugins.missing(optimizations(arm), ()) is None and (odd := _odd(arm)):
        raise Damaged(f"'{path}' is of no arm: {odd}")


@cache
def _odd(arm: str) -> str | None:
    try:
        name = parse(arm).name
    except InputError as error:
        return str(error)
    return None if name == arm else f"{arm} is written {name}"


def _rows(path: Path, epochs: int) -> list[Row]:
    rows = [schema.parse(line, schema.Line, str(path)) for line in schema.content(path).splitlines()]
    if len(rows) != epochs or [row["epoch"] for row in rows] != list(range(1, len(rows) + 1)):
        raise Damaged(f"'{path}' cannot be read ({len(rows)} of {epochs} epochs)")
    if any(row["seconds"] < before["seconds"] for before, row in pairwise(rows)):
        raise Damaged(f"'{path}' has seconds that do not grow")
    return rows


def _correct(path: Path, rows: Sequence[Row]) -> NDArray[np.bool_]:
    with _arrays(path) as archive:
        table: NDArray[np.bool_] = archive["correct"]
    if table.dtype != bool or table.ndim != 2 or len(table) != len(rows) or not table.size:
        raise Damaged(f"'{path}' has {table.dtype} {list(table.shape)}, not whether each image was right, by epoch")
    if not np.allclose(table.mean(1), [row["val/accuracy"] for row in rows], atol=1e-6):
        raise Damaged(f"'{path}' does not have the accuracies of metrics.jsonl")
    return table


@contextmanager
def _arrays(path: Path) -> Iterator[Any]:
    """What `write_arrays` wrote. Damaged for whatever goes wrong with it: a damaged archive raises nearly anything."""
    content = schema.content(path)
    try:
        yield np.load(BytesIO(content))
    except Exception as error:
        raise Damaged(f"'{path}' cannot be read ({type(error).__name__}: {error})") from error


def tokens(path: Path) -> Tokens:
    """How a cell cuts images. Damaged where the file is not what `write_tokens` writes."""
    with _arrays(path) as archive:
        images, patches = archive["images"], archive["patches"]
        (_, channels, height, side), (count, _, _) = images.shape, patches.shape
        corners, sizes = patches[..., :2], patches[..., 2:]
        inside = corners.min() >= 0 and sizes.min() >= 1 and (corners + sizes).max() <= side
        right = (images.dtype, height, count, inside) == (np.uint8, side, len(images), True) and channels in (1, 3)
    if not right or sizes.shape[-1] != 1 or not np.issubdtype(patches.dtype, np.integer):
        raise Damaged(f"'{path}' has no images with the patches that they are cut into")
    return Tokens(images, patches)
