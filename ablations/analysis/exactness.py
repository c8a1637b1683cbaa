"""Whether exact optimizations keep their promise: their arms beside the arms without them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy import stats

from ablations.study.arms import AGAIN
from ablations.study.reading import Study

LEVEL = 0.001  # how often chance may make at most one arm of a study seem to break its contract


class Identity(NamedTuple):
    """An exact optimization's arm, its twin, their first common seed, and how many of its validation images the arm
    alone gets right, and the twin alone."""

    arm: str
    twin: str
    seed: int
    won: int
    lost: int
    images: int

    @property
    def differ(self) -> int:
        """Images that one gets right and the other wrong."""
        return self.won + self.lost

    @property
    def lead(self) -> float:
        """The arm's accuracy minus its twin's, 0 to 1."""
        return (self.won - self.lost) / self.images


def identities(study: Study, twins: Mapping[str, str]) -> list[Identity]:
    """Every arm that was trained at a seed of its twin's."""
    cells = {cell.key: cell.correct[-1] for cell in study.cells if cell.key[0] != AGAIN}
    out = []
    for arm, twin in twins.items():
        seed = next((s for s in study.seeds if {(arm, s), (twin, s)} <= cells.keys()), None)
        if arm != twin and seed is not None:
            ours, theirs = cells[arm, seed], cells[twin, seed]
            out.append(Identity(arm, twin, seed, int((ours & ~theirs).sum()), int((theirs & ~ours).sum()), len(ours)))
    return out


def broken(found: Sequence[Identity], margin: float) -> list[Identity]:
    """Those whose accuracy is further than the margin (0 to 1) from their twin's, and by McNemar's exact test (1947)
    not by chance. (Rounding alone sends training another way: some images differ, as many for better as for worse.)"""
    far = [one for one in found if abs(one.lead) > margin]
    return [one for one in far if stats.binomtest(one.won, one.differ).pvalue < LEVEL / len(found)]
