"""Studies in which what each optimization does was planted, and their verdicts."""

import numpy as np

from ablations.analysis.comparisons import Comparisons
from ablations.analysis.factors import levels
from ablations.analysis.timing import Timing
from ablations.study import arms
from ablations.study.arms import twin
from ablations.study.outcomes import Cell
from ablations.study.reading import Study

NAMES = [arm for arm in arms.lattice() if "crs" not in arm]  # decatt, flash (exact) and mrt
POINT = {"accuracy": 1.0, "time": 2.0, "memory": 2.0}


def study(rng, seeds=3, names=NAMES, accuracy=None, peak=None, images=400, shared=False, every=False):
    """accuracy, peak: what an optimization adds to the share of right answers and multiplies the peak by. Exact arms
    have the first seed only, and their twins' answers."""
    cells = {}
    for seed in range(seeds):
        chances = np.random.default_rng(0 if shared else seed).beta(6, 1, images)
        for arm in sorted(names, key=lambda name: (name != "baseline", name.count("+"))):
            if twin(arm) != arm and twin(arm) in names and seed and not every:
                continue
            own = sum((accuracy or {}).get(part, 0.0) for part in levels(arm))
            peaks = np.prod([(peak or {}).get(part, 1.0) for part in levels(arm)])
            result = {"arm": arm, "seed": seed, "peak_bytes": int(1e9 * peaks), "final_val_loss": 1.0 - own}
            result |= {"step_ms_median": 9.0, "epochs": 1} | ({} if shared else {"held_out": seed})
            if twin(arm) != arm and (twin(arm), seed) in cells:
                right = cells[twin(arm), seed].correct[-1]
            else:
                right = rng.random(images) < chances * 0.9 / (6 / 7) + own
            cells[arm, seed] = Cell(result, [], None, right[None])
    configuration = {"data": "digits", "epochs": 1, "preset": "quick"}
    return Study((), configuration, {}, list(cells.values()), [])


def timed(rng, names, ratio=None, rounds=20):
    """A pass with a drift, and a tenth of its blocks disturbed by another process."""
    drift = np.exp(0.1 * np.sin(np.arange(rounds)))
    blocks = [[] for _ in range(rounds)]
    for arm in [*names, arms.AGAIN]:
        mine = np.prod([(ratio or {}).get(part, 1.0) for part in levels(arm)])
        noise = 0.01 * rng.standard_normal(rounds) + (rng.random(rounds) < 0.1) * rng.exponential(0.3, rounds)
        for took, seconds in zip(blocks, mine * drift * np.exp(noise), strict=True):
            took.append((arm, seconds))
    return Timing(blocks, True)


def compared(study, timing=None, **given):
    return Comparisons(study, timing=timing, **given)


def told(comparisons):
    return {(r["optimization"], r["response"]): r for r in comparisons.verdicts.to_dict("records")}
