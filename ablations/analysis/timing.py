"""The timing pass of a study: every arm's seconds in each of its interleaved rounds."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path

import numpy as np

from ablations.analysis.estimates import Values
from core.errors import InputError


@dataclass(frozen=True)
class Timing:
    """rounds: how many. quiet: whether the machine was. seconds: of an arm's block, by round; None where it has
    none. baseline: the arm that the others are compared with in every round."""

    rounds: int
    quiet: bool
    seconds: dict[str, list[float | None]]
    baseline: str

    @property
    def ratios(self) -> dict[tuple[str, int], Values]:
        """(arm, round) -> the logarithm [1] of its seconds over the baseline's in the same round."""
        base = self.seconds[self.baseline]
        return {
            (arm, i): np.array([log(mine / theirs)])
            for arm, seconds in self.seconds.items()
            for i, (mine, theirs) in enumerate(zip(seconds, base, strict=False))
            if mine and theirs
        }


def read(folders: Sequence[Path]) -> Timing | None:
    """The timing pass in a study's folder; None if there is none, or several studies are joined: their passes may be of
    different hours. Raises InputError if it cannot be read."""
    path = folders[0] / "timing.json"
    if len(folders) > 1 or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        out = Timing(found["rounds"], found["quiet"], found["seconds"], found["baseline"])
        _ = out.ratios
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"'{path}' cannot be read ({type(error).__name__}: {error}); measure again with run.py --timing-only"
        ) from error
    return out
