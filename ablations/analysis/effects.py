"""What each optimization does to a response: main effects and two-way interactions of a factorial study.

A response is a table: (arm, seed) -> values [I], the correctness of every validation image, or one number (I = 1). (Of
step time the rounds of the timing pass stand for seeds.) An arm is a cell of a factorial: `crs@0.3+flash` has factor
crs at 0.3, flash on, the others off. Within a seed all arms share initial weights and data order, so each effect is
first taken within every seed (and image), then over seeds.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ablations.analysis.design import Design
from ablations.analysis.estimates import Estimate, Estimator, Values, moderated
from ablations.analysis.factors import Term, in_factorial
from ablations.analysis.responses import Table

Contrast = Mapping[str, float]  # the weight of each arm


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

    def of_order(self, order: int) -> list[Effect]:
        """Main effects (1) or interactions (2): their intervals hold together."""
        return [effect for effect in self.effects if len(effect.term) == order]


def fit(table: Table, without: Collection[str] = (), estimator: Estimator = moderated) -> Effects:
    """Main effects and interactions of a response; cells that are missing are fitted without.

    without: arms to leave out (a baseline that is another model). A seed whose arms do not determine an effect is left
    out of this effect; interactions that cannot be told from main effects are left out of the model.
    """
    table = {cell: y for cell, y in table.items() if in_factorial(cell[0]) and cell[0] not in without}
    present = {seed: tuple(sorted(arm for arm, s in table if s == seed)) for seed in sorted({s for _, s in table})}
    design = Design(tuple(sorted({arm for arm, _ in table}))).determined()
    out, lost = [], []
    for terms in (design.mains, design.pairs):
        contrasts = {
            term: {
                seed: dict(zip(arms, w, strict=True))
                for seed, arms in present.items()
                if (w := design.weights(term, arms)) is not None
            }
            for term in terms
        }
        found = contrasted(table, list(contrasts.values()), estimator)
        out += [Effect(term, e) for term, e in zip(contrasts, found, strict=True) if e]
        lost += [term for term, e in zip(contrasts, found, strict=True) if not e]
    return Effects(design, out, lost)


def differences(
    table: Table, groups: Iterable[Sequence[tuple[str, str]]], estimator: Estimator = moderated
) -> list[Estimate | None]:
    """Of each group of pairs of arms the mean of one minus the other, within the seeds that have a pair; None without
    such a seed."""
    seeds = sorted({seed for _, seed in table})
    contrasts = []
    for pairs in groups:
        by_seed = {}
        for seed in seeds:
            there = [pair for pair in pairs if all((arm, seed) in table for arm in pair)]
            weights: dict[str, float] = {}
            for one, other in there:
                weights[one] = weights.get(one, 0) + 1 / len(there)
                weights[other] = weights.get(other, 0) - 1 / len(there)
            if there:
                by_seed[seed] = weights
        contrasts.append(by_seed)
    return contrasted(table, contrasts, estimator)


def contrasted(
    table: Table, contrasts: Sequence[Mapping[int, Contrast]], estimator: Estimator = moderated
) -> list[Estimate | None]:
    """Estimates of contrasts of one kind, each given by its weights in every seed that has it; None without one."""
    column = _columns(table)
    there = [by_seed for by_seed in contrasts if by_seed]
    weights = np.zeros((len(there), len(set(column.values()))))
    for row, by_seed in zip(weights, there, strict=True):
        for arm, w in next(iter(by_seed.values())).items():
            row[column[arm]] += w
    within = [np.array([_sum(table, seed, ws) for seed, ws in by_seed.items()]) for by_seed in there]
    found = iter(estimator(within, weights))
    return [next(found) if by_seed else None for by_seed in contrasts]


def _sum(table: Table, seed: int, weights: Contrast) -> Values:
    return np.sum([w * table[arm, seed] for arm, w in weights.items()], axis=0)


def _columns(table: Table) -> dict[str, int]:
    """Arms numbered, those whose values are the same in every seed (exact twins) with one number."""
    values: dict[str, tuple[tuple[int, bytes], ...]] = {}
    for (arm, seed), y in sorted(table.items()):
        values[arm] = (*values.get(arm, ()), (seed, y.tobytes()))
    numbers = {value: i for i, value in enumerate(dict.fromkeys(values.values()))}
    return {arm: numbers[value] for arm, value in values.items()}
