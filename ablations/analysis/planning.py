"""How many seeds a verdict on accuracy will need: from those trained, or for several deviations from seed to seed."""

from dataclasses import replace
from math import sqrt
from pathlib import Path

from ablations.analysis import verdicts
from ablations.analysis.comparisons import compare
from ablations.analysis.estimates import Estimate, seeds_for


def from_results(out: Path, margin: float) -> dict[str, float]:
    """Of a study of two seeds or more, by optimization: the seeds after which its accuracy would have a verdict at a
    margin in points, as far as those trained tell (nan: the validation images are too few for any)."""
    comparisons = compare([out])
    comparisons = replace(comparisons, margins={**comparisons.margins, "accuracy": margin})
    frame = verdicts.verdicts(comparisons)
    rows = frame[(frame["response"] == "accuracy") & (frame["seeds"] > 1)]
    undecided = rows["verdict"] == verdicts.UNDECIDED
    return dict(zip(rows["optimization"], rows["seeds"] + rows["more"].where(undecided, 0), strict=True))


def by_deviation(margin: float, optimizations: int) -> dict[float, int | None]:
    """For deviations of an optimization's effect from seed to seed (points): the seeds after which the intervals of all
    optimizations, together, are as narrow as the margin to either side."""
    return {
        deviation: seeds_for(margin, Estimate(0.0, deviation / sqrt(2), 1.0, 2), max(optimizations, 1))
        for deviation in (margin / 2, margin, 2 * margin)
    }
