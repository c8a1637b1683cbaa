"""What data, augmentation and logging cost a training epoch: `python ablations/bench.py --what data`.

The same eager (on CUDA: graphed) loop of the 4.2 M parameter model over batches that are ready; over images in memory,
augmented; and over images behind a memory map on disk, augmented, read one batch ahead.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from ablations.study.store import Recorder
from core import engine, rng, vit
from core.data.augment import preparation
from core.data.batches import batches
from core.data.splits import Split
from core.measure import interleaved
from core.ops import EXACT
from core.step import AdamW, Metrics, objective, start

CONFIG = vit.VitConfig(image=32, patch=4, width=192, depth=12, heads=3, mlp=512, classes=10, dropout=0.1)


def compare(size: int, rounds: int, device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Seconds of an epoch (50,000 images on CUDA; else four batches) and the share of the throughput that is lost;
    and of one epoch's records, and of reading its batches alone."""
    count = 50_000 if device.type == "cuda" else 4 * size
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npy"
        np.save(path, np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8))
        mapped = Split(torch.from_numpy(np.load(path, mmap_mode="c")), torch.arange(count) % 10)
        held = Split(mapped.images.clone().to(device), mapped.labels.to(device))
        augment = preparation((0.5,) * 3, (0.25,) * 3, True, 0, 15.0)
        ready = Split(held.images.float() / 255, held.labels)
        epochs = {
            "ready": _epoch(ready, lambda images, key: images, size, device, dtype),
            "in memory, augmented": _epoch(held, augment, size, device, dtype),
            "streamed, augmented": _epoch(mapped, augment, size, device, dtype),
        }
        seconds = interleaved(epochs, rounds, device)
        figures = {name: {"seconds": median(times)} for name, times in seconds.items()}
        for name in figures:
            ratios = [a / b for a, b in zip(seconds["ready"], seconds[name], strict=True)]
            figures[name]["share of throughput lost"] = 1 - median(ratios)
        whole = figures["in memory, augmented"]["seconds"]
        alone: dict[str, Callable[[], object]] = {
            "reading alone": lambda: [None for _ in batches(mapped, torch.arange(count), size, device)],
            "records of an epoch": lambda: _records(Path(folder) / "cell"),
        }
        for name, times in interleaved(alone, rounds, device).items():
            figures[name] = {"seconds": median(times), "share of an epoch": median(times) / whole}
    return figures


def _epoch(split: Split, prepare: Any, size: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Metrics]:
    how = "graphed" if device.type == "cuda" else "eager"
    step = engine.build(objective(CONFIG, EXACT, prepare, dtype), AdamW(), how)
    loop = engine.loop(how, step, split, size, device, {})
    state = [start({name: p.to(device) for name, p in vit.init(CONFIG, 0).items()}, rng.key(0, device))]

    def run() -> Metrics:
        order: Tensor = rng.permutation(state[0].key, len(split.labels))
        state[0], metrics = loop.epoch(state[0], order)
        return metrics

    return run


def _records(folder: Path) -> None:
    recorder = Recorder(folder)
    begin = time.perf_counter()
    recorder.epoch({"epoch": 1, "train/loss": begin, "val/accuracy": 0.5, "speed/step_ms": 1.0, "seconds": 1.0})
    recorder.close()


def show(figures: dict[str, dict[str, float]], console: Console) -> None:
    """One line a contender."""
    for name, figure in figures.items():
        rest = ", ".join(f"{100 * share:.2f} % {what[6:]}" for what, share in figure.items() if what != "seconds")
        console.print(f"{name:<26} {figure['seconds']:9.4f} s  {rest}", highlight=False)
