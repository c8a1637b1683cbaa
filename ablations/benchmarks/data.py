"""What data, augmentation and logging cost a training epoch.

The same eager (on CUDA: graphed) loop of the 4.2 M parameter model over batches that are ready; over images in memory,
augmented; and over images behind a memory map on disk, augmented, read one batch ahead.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ablations.benchmarks import contest, ours
from ablations.benchmarks.contest import Figures
from ablations.study.recorder import Recorder
from core import rng, vit
from core.data.augment import preparation
from core.data.batches import batches
from core.data.splits import Split
from core.layers import EXACT
from core.step import Prepare

CONFIG = vit.VitConfig(image=32, patch=4, width=192, depth=12, heads=3, mlp=512, classes=10, dropout=0.1)


def compare(size: int, rounds: int, device: torch.device, dtype: torch.dtype) -> Figures:
    """Figures of an epoch (50,000 images on CUDA; else four batches), against one over ready batches; and of its
    records, and of reading its batches alone, as shares of an epoch."""
    count, how = (50_000, "graphed") if device.type == "cuda" else (4 * size, "eager")
    order = rng.permutation(rng.key(0, device), count)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npy"
        np.save(path, np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8))
        mapped = Split(torch.from_numpy(np.load(path, mmap_mode="c")), torch.arange(count) % 10)
        held = Split(mapped.images.clone().to(device), mapped.labels.to(device))
        augment = preparation((0.5,) * 3, (0.25,) * 3, True, 0, 15.0)

        def epoch(split: Split, prepare: Prepare) -> Callable[[], object]:
            return ours.contender(EXACT, CONFIG, split, order, size, how, dtype, device, prepare).run

        epochs = {
            "ready": epoch(Split(held.images.float() / 255, held.labels), lambda images, key: images),
            "in memory, augmented": epoch(held, augment),
            "streamed, augmented": epoch(mapped, augment),
        }
        figures = contest.contest(epochs, rounds, device, "ready")
        alone: dict[str, Callable[[], object]] = {
            "reading alone": lambda: [None for _ in batches(mapped, order, size, device)],
            "records of an epoch": lambda: _records(Path(folder) / "cell"),
        }
        for name, figure in contest.contest(alone, rounds, device, "reading alone").items():
            share = figure["seconds"] / figures["in memory, augmented"]["seconds"]
            figures[name] = {"seconds": figure["seconds"], "share": share}
    return figures


def _records(folder: Path) -> None:
    recorder = Recorder(folder)
    begin = time.perf_counter()
    recorder.epoch({"epoch": 1, "train/loss": begin, "val/accuracy": 0.5, "speed/step_ms": 1.0, "seconds": 1.0})
    recorder.close()
