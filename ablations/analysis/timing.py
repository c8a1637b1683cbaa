"""The timing pass of a study: every arm's seconds in each of its interleaved rounds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ablations.analysis.estimates import Values
from ablations.study import reading
from ablations.study.arms import BASELINE
from core.measure import Round, drawn_in


@dataclass(frozen=True)
class Timing:
    """rounds: seconds of the arms' blocks in each. quiet: whether the machine was. identity: of what was timed (see
    study/identity.py). failed: why other arms were not timed."""

    rounds: Sequence[Round]
    quiet: bool
    identity: dict[str, Any] | None = None
    failed: Mapping[str, str] = field(default_factory=dict)

    @property
    def arms(self) -> set[str]:
        """Those that were timed."""
        return {arm for took in self.rounds for arm, _ in took}

    @cached_property
    def table(self) -> dict[tuple[str, int], Values]:
        """(arm, round) -> the logarithm [1] of its seconds over the baseline's in the same round, of each arm the
        highest and lowest fifth drawn in to the next (winsorized; see `drawn_in`). Where arms did not fit together,
        rounds count from 0 in every group, so that arms of different groups are compared through the baseline; of the
        baseline, which is in all of them, they count on.

        Drawing in before the contrasts, arm by arm, is what makes a main effect robust: it is a mean over all arms, and
        in nearly every round one of 24 is disturbed. With a tenth of the blocks disturbed its intervals are a third of
        those of the mean over rounds and of a trimmed mean of contrasts; with none a tenth wider than the mean's.
        """
        drawn = drawn_in(self.rounds, BASELINE)
        rows = {arm: row[~np.isnan(row)] for arm, row in drawn.items()}
        return {(arm, i): np.array([y]) for arm, row in rows.items() for i, y in enumerate(row)}


def read(folders: Sequence[Path]) -> Timing | None:
    """The timing pass in a study's folder; None if there is none, or several studies are joined: their passes may be of
    different hours. Damaged if it cannot be read."""
    found = reading.timing(folders[0]) if len(folders) == 1 else None
    if found is None:
        return None
    return Timing(found["blocks"], found["quiet"], found.get("identity"), found.get("failed", {}))
