"""What a study writes: a folder a cell, TensorBoard events, and JSON files that appear whole or not at all."""

import fcntl
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.errors import InputError

Result = dict[str, Any]
Row = dict[str, float]

LAYOUT = {
    "Arms side by side": {
        "Validation accuracy": ["Multiline", [r"^val/accuracy$"]],
        "Validation loss": ["Multiline", [r"^val/loss$"]],
        "Training loss": ["Multiline", [r"^train/loss$"]],
        "Images per second": ["Multiline", [r"^speed/images_per_second$"]],
        "Step time (ms)": ["Multiline", [r"^speed/step_ms$"]],
        "Peak memory of a step (MiB)": ["Multiline", [r"^memory/peak_mib$"]],
    }
}


METRICS = (
    "best_val_accuracy",
    "final_val_accuracy",
    "final_val_loss",
    "final_train_loss",
    "images_per_second",
    "step_ms_median",
    "train_seconds",
    "mfu",
    "parameters",
)
MACHINE = ("torch", "device_name", "threads")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold a study's folder; InputError if another process does."""
    with (out / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"'{out}' is in use by another run; wait for its end, or pass another --out") from error
        yield


def write_text(path: Path, text: str) -> None:
    """Replace a file's content atomically."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def environment(device: str) -> dict[str, str]:
    """Versions, hardware and source revision."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    try:
        here = Path(__file__).parent
        git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
        revision = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = "unknown"
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "device_name": name,
        "threads": str(torch.get_num_threads()),
        "revision": revision,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def open_study(out: Path, preset: str, recipe: dict[str, Any], versions: dict[str, str]) -> None:
    """Create a study's folder, or continue it. InputError if its cells were made by another recipe, torch or machine:
    they could not be compared."""
    path = out / "study.json"
    configuration = json.loads(json.dumps({"preset": preset, **recipe}))
    if path.is_file():
        study = json.loads(path.read_text())
        before = study["configuration"] | {k: study["environment"][k] for k in MACHINE}
        configuration |= {k: versions[k] for k in MACHINE}
        keys = [k for k in {**before, **configuration} if before.get(k) != configuration.get(k)]
        if keys:
            changes = ", ".join(f"{k} {before.get(k)!r} -> {configuration.get(k)!r}" for k in keys)
            raise InputError(f"'{out}' holds a study with other settings ({changes}); pass another --out, or the same")
        return
    if out.exists() and any(out.iterdir()):
        raise InputError(f"'{out}' is not empty and holds no study; pass another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, {"configuration": configuration, "environment": versions})


def cell_folder(out: Path, arm: str, seed: int) -> Path:
    """Where a cell is kept."""
    return out / arm / f"seed{seed}"


def finished(folder: Path) -> bool:
    """Whether the cell has a result."""
    return (folder / "result.json").is_file()


def results(out: Path) -> list[Result]:
    """The results of all finished cells, sorted by arm and seed."""
    return [json.loads(path.read_text()) for path in sorted(out.glob("*/seed*/result.json"))]


def failures(out: Path) -> list[Result]:
    """What is recorded of the cells that failed last time."""
    return [json.loads(path.read_text()) for path in sorted(out.glob("*/seed*/failed.json"))]


def history(out: Path, result: Result) -> list[Row]:
    """A cell's metrics by epoch."""
    path = cell_folder(out, result["arm"], result["seed"]) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


class Recorder:
    """A cell's files while it trains. result.json comes last: without it the cell does not count."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
        folder.mkdir(parents=True)
        self.folder = folder
        self._writer = SummaryWriter(str(folder))
        self._writer.add_custom_scalars(LAYOUT)
        self._metrics = (folder / "metrics.jsonl").open("w")

    def epoch(self, row: Row) -> None:
        """Add one epoch's metrics to metrics.jsonl and TensorBoard (tags are the keys with a /)."""
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        for tag, value in row.items():
            if "/" in tag:
                self._writer.add_scalar(tag, value, int(row["epoch"]))

    def picture(self, tag: str, pixels: Tensor) -> None:
        """Add a picture (uint8 [3,H,W]) to the cell's folder, as TAG.png, and to TensorBoard."""
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(self.folder / f"{tag}.png")
        self._writer.add_image(tag, pixels, 0)

    def correct(self, table: Tensor) -> None:
        """Keep which validation images were classified correctly after each epoch: bool [epochs, images]."""
        np.savez_compressed(self.folder / "correct.npz", correct=table.numpy())

    def finish(self, result: Result, settings: dict[str, Any]) -> None:
        """Close the cell: HParams in the cell's own event file, then the result."""
        from torch.utils.tensorboard.summary import hparams

        measured = {f"result/{k}": float(result[k]) for k in METRICS}
        measured |= {f"result/{k}_mib": result[f"{k}_bytes"] / 2**20 for k in ("peak", "kept")}
        shown = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
        for summary in hparams(shown, measured):
            self._writer._get_file_writer().add_summary(summary)
        for tag, value in measured.items():
            self._writer.add_scalar(tag, value, result["epochs"])
        self.close()
        write_json(self.folder / "result.json", result)

    def fail(self, arm: str, seed: int, error: BaseException, trace: str) -> None:
        """Close the cell as failed: failed.json tells why."""
        self.close()
        write_json(
            self.folder / "failed.json",
            {"arm": arm, "seed": seed, "error": f"{type(error).__name__}: {error}", "traceback": trace},
        )

    def close(self) -> None:
        """Close the files."""
        self._writer.close()
        self._metrics.close()
