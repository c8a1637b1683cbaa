"""Studies written by hand: accuracies near what is planted, costs the product of the optimizations' ratios."""

import json

import numpy as np

from ablations.study import arms
from ablations.study.presets import PRESETS
from ablations.study.store import cell_folder

IMAGES, EPOCHS = 100, 4
NAMES = [arm for arm in arms.lattice() if "crs@0.5" not in arm]  # four factors at two levels
COST = {"flash": (0.9, 0.8), "decatt": (1.2, 1.0), "mrt": (1.1, 0.98), "crs@0.3": (1.4, 0.8)}


def cell(folder, arm, seed, share=0.8, noise=0.02, **changed):
    """A finished cell: its accuracy near `share`, time and memory the product of its optimizations' ratios."""
    rng = np.random.default_rng([seed, *arm.encode()])
    parts = [] if arm.startswith("baseline") else arm.split("+")
    ratios = np.prod([COST.get(part, (1.0, 1.0)) for part in parts], axis=0) if parts else (1.0, 1.0)
    step, peak = 20 * ratios[0] * np.exp(noise * rng.standard_normal()), int(ratios[1] * 2**24)
    growth = [share - 0.1, share - 0.05, share - 0.02, share]
    correct = np.array([rng.permutation(IMAGES) < round(IMAGES * (a + noise * rng.standard_normal())) for a in growth])
    seconds = step / 1000 * 50
    rows = [
        {"epoch": i + 1, "val/accuracy": float(c.mean()), "val/loss": 1 - c.mean(), "train/loss": 1.1 - c.mean(),
         "seconds": seconds * (i + 1), "speed/images_per_second": 32 / step * 1000}
        for i, c in enumerate(correct)
    ]  # fmt: skip
    result = {
        "arm": arm, "seed": seed, "preset": "quick", "data": "digits", "parameters": 1000, "epochs": EPOCHS,
        "best_val_accuracy": max(r["val/accuracy"] for r in rows), "final_val_accuracy": rows[-1]["val/accuracy"],
        "final_val_loss": rows[-1]["val/loss"], "final_train_loss": rows[-1]["train/loss"],
        "train_seconds": seconds * EPOCHS,
        "images_per_second": 32 / step * 1000, "step_ms_median": step, "peak_bytes": peak, "reserved_bytes": peak,
        "predicted_peak_bytes": peak, "bytes_per_image": 2**18, "kept_bytes": peak // 2,
        "kept_by_op": {"qkv mm": peak // 2}, "flops_per_image": 10**6, "mfu": 0.3, "gpu": {}, "batch_size": 32,
    }  # fmt: skip
    path = cell_folder(folder, arm, seed)
    path.mkdir(parents=True)
    np.savez_compressed(path / "correct.npz", correct=correct)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "result.json").write_text(json.dumps(result | changed))


def study(folder, names, seeds, accuracy=lambda arm: 0.8, **configuration):
    """A folder with these cells."""
    folder.mkdir(parents=True)
    recipe = {k: v for k, v in vars(PRESETS["quick"]).items() if k != "set"}
    given = {"preset": "quick", **recipe, "set": [], "epochs": EPOCHS, "batch_size": 32, **configuration}
    machine = {"torch": "2.15.0", "device_name": "a processor", "threads": "2", "revision": "abc"}
    (folder / "study.json").write_text(json.dumps({"configuration": given, "environment": machine}))
    for arm in names:
        for seed in seeds:
            cell(folder, arm, seed, accuracy(arm), data=given["data"], preset=given["preset"])
    return folder


def timed(folder, names, rounds=12):
    """A timing pass: COST's ratios with a hundredth of noise."""
    rng, blocks = np.random.default_rng(0), [[] for _ in range(rounds)]
    for arm in [*names, arms.AGAIN]:
        ratio = np.prod([COST.get(part, (1.0, 1.0))[0] for part in arm.split("+")])
        for took in blocks:
            took.append((arm, ratio * np.exp(0.01 * rng.standard_normal())))
    made = {"baseline": "baseline", "rounds": rounds, "quiet": False, "blocks": blocks, "ratios": {}}
    (folder / "timing.json").write_text(json.dumps(made))
