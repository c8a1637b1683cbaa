"""What each optimization does to a response: main effects and two-way interactions of a factorial study.

A response is a table: (arm, seed) -> values [I], the correctness of every validation image, or one number (I = 1).
An arm is a cell of a factorial: `crs@0.3+flash` has factor crs at 0.3, flash on, the others off. Within a seed all arms
share initial weights and data order, so each effect is first taken within every seed (and image), then over seeds:
arms that give nearly the same result (`flash` is exact) do not count as independent observations.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ablations.analysis.design import Design
from ablations.analysis.estimates import Estimate, estimate
from ablations.analysis.factors import Term, in_factorial
from ablations.analysis.responses import Table


class Effect(NamedTuple):
    """A main effect or interaction of one response."""

    term: Term
    estimate: Estimate


@dataclass(frozen=True)
class Effects:
    """All effects of a response, and those that the arms do not determine."""

    design: Design
    effects: list[Effect]
    lost: list[Term]

    @property
    def together(self) -> int:
        """How many intervals hold together: all of the response's effects."""
        return len(self.effects)


def fit(table: Table, without: Collection[str] = ()) -> Effects:
    """Main effects and interactions of a response; cells that are missing are fitted without.

    without: arms to leave out (a baseline that is another model). A seed whose arms do not determine an effect is left
    out of this effect; interactions that cannot be told from main effects are left out of the model.
    """
    table = {cell: y for cell, y in table.items() if in_factorial(cell[0]) and cell[0] not in without}
    present = {seed: tuple(sorted(arm for arm, s in table if s == seed)) for seed in {s for _, s in table}}
    design = Design(tuple(sorted({arm for arm, _ in table}))).determined()
    out, lost = [], []
    for term in (*design.mains, *design.pairs):
        weights = {seed: w for seed, arms in sorted(present.items()) if (w := design.weights(term, arms)) is not None}
        within = [sum(w * table[arm, s] for w, arm in zip(ws, present[s], strict=True)) for s, ws in weights.items()]
        if within:
            out.append(Effect(term, estimate(np.array(within))))
        else:
            lost.append(term)
    return Effects(design, out, lost)


def difference(table: Table, arm: str, other: str) -> Estimate | None:
    """One arm minus another, within seeds that have both; None without such a seed."""
    seeds = sorted({s for a, s in table if a == arm} & {s for a, s in table if a == other})
    return estimate(np.array([table[arm, s] - table[other, s] for s in seeds])) if seeds else None
