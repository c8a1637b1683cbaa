"""What the files of a study must hold: each is checked where it is read back, and a damaged one is named.

Whatever a study writes as JSON carries the SHA-256 of its content (`sealed`), so that a flipped bit that leaves valid
JSON is found too; without one, as in a file written by hand, the content alone is checked.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import fields
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Self, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from ablations.study.arms import BASELINE
from ablations.study.presets import PRESETS
from ablations.study.recipes import SEEDS_MOST, Recipe
from core.errors import InputError, choose

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=1e-15, lt=1e18)]  # what is beyond was not measured, and would overflow
Loss = Annotated[float, Field(gt=-1e39, lt=1e39)]  # of float32
Count = Annotated[int, Field(ge=1, lt=2**63)]
Bytes = Annotated[int, Field(ge=0, lt=2**63)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]+$")]
Name = Annotated[str, Field(pattern=r"^[^\x00-\x1f/]+$")]

SEAL = "sha256"
_NO_FILE = (None, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
BESIDE = ("metrics.jsonl", "correct.npz")  # what a result tells the digests of
_REPORTED = (  # settings that a report needs; an earlier version may not have had the others
    *("data", "image", "baseline_width", "baseline_heads", "epochs", "batch_size", "device", "engine", "precision"),
    "set",
)


class Damaged(InputError):
    """A file that is not what the program wrote."""


class Unread(Damaged):
    """A file that may be whole: this process cannot read it, now."""


class Checked(BaseModel):
    """Types as they are in JSON, numbers finite; further keys are let be."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


_HINTS = get_type_hints(Recipe)
_TYPED: Any = {f.name: (_HINTS[f.name], ... if f.name in _REPORTED else f.default) for f in fields(Recipe)}
_PRESET: Any = Annotated[str, AfterValidator(lambda name: choose("preset", name, PRESETS))]
Settings: Any = create_model("Settings", __base__=Checked, **_TYPED)
Configuration: Any = create_model("Configuration", __base__=Settings, preset=(_PRESET, ...))


class Environment(Checked):
    """Where a study ran."""

    torch: str
    device_name: str
    threads: str


class Same(Checked):
    """Digests of what makes cells comparable (see identity.py)."""

    code: Digest
    data: Digest
    weights: Digest | None


class StudyFile(Checked):
    """study.json"""

    configuration: Configuration
    environment: Environment
    identity: Same | None = None
    ceiling: dict[str, Annotated[float, Field(gt=1e6, lt=1e18)]] = {}
    parts: Annotated[int, Field(ge=1, le=2**31)] | None = None
    parameters: dict[Name, Count] = {}


class Failure(Checked):
    """failed.json"""

    arm: Name
    seed: Bytes
    error: str


class ClaimFile(Checked):
    """A claim's file (see claims.py)."""

    host: str
    pid: Annotated[int, Field(ge=1, lt=2**31)]
    token: str
    reached: Bytes
    died: Bytes


class Outcome(Checked):
    """result.json"""

    arm: Name
    seed: Bytes
    data: str
    parameters: Count
    epochs: Count
    best_val_accuracy: Share
    final_val_accuracy: Share
    final_val_loss: Loss
    final_train_loss: Loss
    train_seconds: Positive
    images_per_second: Positive
    step_ms_median: Positive
    peak_bytes: Count
    predicted_peak_bytes: Count
    kept_bytes: Bytes
    kept_by_op: dict[str, Bytes]
    mfu: Positive
    batch_size: Count
    stopped_seconds: float = 0.0
    reserved_bytes: Bytes = 0
    flops_per_image: Bytes = 0
    held_out: int | None = None
    identity: Same | None = None
    settings: str | None = None
    files: dict[str, Digest] = {}

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.files and self.files.keys() != {*BESIDE}:
            raise ValueError(f"files are {', '.join(self.files)}, not {' and '.join(BESIDE)}")
        if self.kept_bytes != sum(self.kept_by_op.values()):
            raise ValueError(f"kept_bytes {self.kept_bytes} are not those of kept_by_op")
        if odd := [key for key, value in (self.model_extra or {}).items() if not _is_finite(value)]:
            raise ValueError(f"{odd[0]} is not finite")
        return self


class Line(Checked):
    """A line of metrics.jsonl."""

    epoch: Count
    accuracy: Share = Field(alias="val/accuracy")
    loss: Loss = Field(alias="val/loss")
    train: Loss = Field(alias="train/loss")
    seconds: Positive
    rate: Positive = Field(alias="speed/images_per_second")


class Reached(Checked):
    """What a snapshot says of its course (see course.py)."""

    best_accuracy: Annotated[float, Field(ge=-1, le=1)]
    history: list[Line]
    times: list[float]
    loss: Loss


class TimingFile(Checked):
    """timing.json"""

    rounds: Count
    quiet: bool
    blocks: list[list[tuple[Name, Positive]]]
    ratios: dict[str, Any]
    failed: dict[Name, str] = {}
    identity: Same | None = None
    settings: str | None = None

    @model_validator(mode="after")
    def _one_a_round(self) -> Self:
        if len(self.blocks) != self.rounds:
            raise ValueError(f"blocks of {len(self.blocks)} of {self.rounds} rounds")
        if not all(any(arm == BASELINE for arm, _ in took) for took in self.blocks):
            raise ValueError(f"rounds without {BASELINE}")
        return self


class Called(Checked):
    """An operation of profile.json."""

    name: str
    category: str
    calls: Annotated[float, Field(ge=0)]
    ms: float
    mib: float


class ProfileFile(Checked):
    """profile.json"""

    arm: Name
    device: str
    steps: Count
    wall_ms: Positive
    profiled_ms: Positive
    operations: Annotated[list[Called], Field(min_length=1)]
    at_ms: Annotated[list[float], Field(min_length=1)]
    live: list[Annotated[int, Field(gt=-(2**63), lt=2**63)]]

    @model_validator(mode="after")
    def _alike(self) -> Self:
        if len(self.at_ms) != len(self.live):
            raise ValueError(f"{len(self.at_ms)} times of {len(self.live)} sizes")
        if self.at_ms != sorted(self.at_ms):
            raise ValueError("times that go back")
        return self


class MarginsFile(Checked):
    """margins.json"""

    margins: dict[str, Positive]
    looks: Annotated[int, Field(ge=1, lt=SEEDS_MOST)]


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """With the digest of its content."""
    plain = {key: of for key, of in value.items() if key != SEAL}
    return plain | {SEAL: digest(json.dumps(plain, sort_keys=True).encode())}


def settings(study: Mapping[str, Any]) -> str:
    """Of the configuration that study.json has: what a cell was trained under."""
    return digest(json.dumps(study["configuration"], sort_keys=True).encode())


def whole(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the settings that an earlier version did not have, which did what is their default."""
    return {**json.loads(json.dumps(vars(Recipe()))), **configuration}


def digest(content: bytes) -> str:
    """SHA-256."""
    return hashlib.sha256(content).hexdigest()


def read(path: Path, kind: type[Checked]) -> dict[str, Any]:
    """A JSON file's content, of this kind; Damaged, with its name and what is wrong, if it is not."""
    return parse(content(path), kind, str(path))


def content(path: Path) -> bytes:
    """A file's bytes; Damaged if there is no such file, Unread if there is and the system does not give them."""
    if not os.path.lexists(path):
        raise Damaged(f"'{path}' is not there")
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise Damaged(f"'{path}' is no regular file")
        return _bytes(path)
    except MemoryError as error:
        raise Damaged(f"'{path}' cannot be read (it does not fit into memory)") from error
    except (OSError, ValueError) as error:  # the latter: of a name that cannot be one
        kind = Damaged if getattr(error, "errno", None) in _NO_FILE else Unread
        raise kind(f"'{path}' cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        return path.read_bytes()  # on NFS: another machine replaced it while it was read


def parse(text: bytes, kind: type[Checked], name: str) -> dict[str, Any]:
    """The same of a file's bytes, or of a line of them."""
    try:
        kind.model_validate_json(text)
        found: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"'{name}' cannot be read ({said(error)})") from error
    if found.pop(SEAL, None) not in (None, sealed(found)[SEAL]):
        raise Damaged(f"'{name}' cannot be read (it is not as it was written: its {SEAL} is of another content)")
    return found


def said(error: Exception) -> str:
    """What is wrong, in a line."""
    if not isinstance(error, ValidationError):
        return f"{type(error).__name__}: {error}"
    first = error.errors(include_url=False)[0]
    at = ".".join(map(str, first["loc"]))
    return f"{at}: {first['msg']}" if at else first["msg"]


def _is_finite(value: Any) -> bool:
    """Whether no number in it, however deep, is infinite or no number at all."""
    if isinstance(value, float):
        return isfinite(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(map(_is_finite, inner))
