"""Studies written by hand: cells with planted accuracies, times and bytes."""

import json

import numpy as np

from ablations.study.presets import PRESETS
from ablations.study.store import cell_folder, write_json, write_result

STEP_MS = {"baseline": 20.0, "flash": 18.0, "mrt": 22.0, "flash+mrt": 20.0}
KEPT = {"baseline": {"qkv mm": 2**22, "softmax": 2**23}, "flash": {"qkv mm": 2**22}}


def study(folder, arms=tuple(STEP_MS), seeds=3, epochs=4, data="digits", timed=True):
    """Write a study and return its folder: arms, seeds, epochs, data; timed: with a timing pass in which an arm takes
    STEP_MS."""
    recipe = {k: v for k, v in vars(PRESETS["quick"]).items() if k != "set"}
    configuration = {"preset": "quick", **recipe, "set": [], "epochs": epochs, "batch_size": 32, "data": data}
    machine = {"torch": "2.15.0", "device_name": "a processor", "threads": "2", "revision": "abc"}
    folder.mkdir(parents=True)
    known = {"parts": 1, "parameters": dict.fromkeys(arms, 1000)}
    write_json(folder / "study.json", {"configuration": configuration, "environment": machine, **known})
    for arm in arms:
        for seed in range(seeds):
            _cell(cell_folder(folder, arm, seed), arm, seed, epochs, data)
    if timed and "baseline" in arms:
        ms = [[(arm, STEP_MS.get(arm, 20.0) * (1 + 0.01 * (i % 3))) for arm in arms] for i in range(12)]
        timing = {"rounds": 12, "quiet": True, "baseline": "baseline", "ratios": {}, "blocks": ms}
        write_json(folder / "timing.json", timing)
    return folder


def _cell(path, arm, seed, epochs, data):
    rng = np.random.default_rng([seed, *arm.encode()])
    correct = np.array([rng.permutation(100) < 60 + 5 * i + rng.integers(5) for i in range(epochs)])
    ms = 1.5 * STEP_MS.get(arm, 20.0)  # cells are slower than the timing pass: theirs must not be taken for it
    rows = [
        {"epoch": i + 1, "val/accuracy": float(c.mean()), "val/loss": 1 - c.mean(), "train/loss": 1.1 - c.mean(),
         "seconds": i + 1.0, "speed/images_per_second": 32000 / ms + seed, "speed/step_ms": ms}
        for i, c in enumerate(correct)
    ]  # fmt: skip
    kept = KEPT.get(arm, KEPT["baseline"] | {arm: 2**20})
    result = {
        "arm": arm, "seed": seed, "preset": "quick", "data": data, "parameters": 1000, "epochs": epochs,
        "best_val_accuracy": max(r["val/accuracy"] for r in rows), "final_val_accuracy": rows[-1]["val/accuracy"],
        "final_val_loss": rows[-1]["val/loss"], "final_train_loss": rows[-1]["train/loss"],
        "train_seconds": float(epochs),
        "images_per_second": 32000 / ms, "step_ms_median": ms, "peak_bytes": 2**25, "reserved_bytes": 2**25,
        "predicted_peak_bytes": 2**24, "bytes_per_image": 2**18, "kept_bytes": sum(kept.values()), "kept_by_op": kept,
        "flops_per_image": 10**6, "mfu": 0.3, "gpu": {}, "batch_size": 32,
    }  # fmt: skip
    path.mkdir(parents=True)
    np.savez_compressed(path / "correct.npz", correct=correct)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if "mrt" in arm:
        images, patches = rng.integers(0, 255, (2, 1, 8, 8), np.uint8), np.array([[[0, 0, 4], [4, 4, 2]]] * 2)
        np.savez_compressed(path / "tokens.npz", images=images, patches=patches)
    write_result(path, result)
