"""What each optimization does to a response: main effects and two-way interactions of a factorial study.

A response is a table: (arm, seed) -> values [I], the correctness of every validation image, or one number (I = 1).
An arm is a cell of a factorial: `crs@0.3+flash` has factor crs at 0.3, flash on, the others off. Within a seed all arms
share initial weights and data order, so each effect is first taken within every seed (and image), then over seeds:
arms that give nearly the same result (`flash` is exact) do not count as independent observations. One seed has no such
replicates; there the noise is told from the many effects that should be nothing (Lenth, Technometrics 31, 1989).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import combinations, product
from math import nan, sqrt
from typing import NamedTuple

import numpy as np

from ablations.analysis.estimates import Estimate, Values, estimate
from ablations.study.arms import AGAIN, BASELINE
from core.transforms.registry import controls

Table = Mapping[tuple[str, int], Values]
Term = tuple[tuple[str, str], ...]  # (factor, level) once for a main effect, twice for an interaction

_LENTH = 7  # contrasts that the method needs at least: those of three factors at two levels


def levels(arm: str) -> dict[str, str]:
    """The factors of an arm that are not off, each with its level: the value in the arm's name, or "on"."""
    if arm in (BASELINE, AGAIN):
        return {}
    parts = (part.partition("@") for part in arm.split("+"))
    return {factor: level or "on" for factor, _, level in parts}


def in_factorial(arm: str) -> bool:
    """Whether an arm belongs to the factorial: no control, and not the baseline's second run."""
    return arm != AGAIN and not controls() & levels(arm).keys()


def label(term: Term) -> str:
    """`crs@0.3 × mrt`."""
    return " × ".join(factor if level == "on" else f"{factor}@{level}" for factor, level in term)


@dataclass(frozen=True)
class Design:
    """A linear model of these arms: an intercept, the main effects, and the interactions of every two levels that some
    arm has together, but for `dropped` ones. Levels without one are taken not to interact (`apart` names them)."""

    arms: tuple[str, ...]
    dropped: tuple[Term, ...] = ()

    @cached_property
    def factors(self) -> dict[str, list[str]]:
        """Levels of each factor, "off" first."""
        pairs = sorted({pair for arm in self.arms for pair in levels(arm).items()})
        return {factor: ["off", *(lv for f, lv in pairs if f == factor)] for factor, _ in pairs}

    @cached_property
    def mains(self) -> list[Term]:
        """Main effects: each level against off."""
        return [((factor, level),) for factor, names in self.factors.items() for level in names[1:]]

    @cached_property
    def pairs(self) -> list[Term]:
        """Interactions in the model."""
        met = [pair for pair in self._all_pairs if any(_has(levels(arm), pair) for arm in self.arms)]
        return [pair for pair in met if pair not in self.dropped]

    @cached_property
    def apart(self) -> list[Term]:
        """Pairs of levels without an interaction in the model."""
        return [pair for pair in self._all_pairs if pair not in self.pairs]

    @property
    def _all_pairs(self) -> list[Term]:
        return [(*a, *b) for a, b in combinations(self.mains, 2) if a[0][0] != b[0][0]]

    def rows(self, arms: Iterable[str], terms: Sequence[Term]) -> Values:
        """Indicators [arms, 1 + terms] of the intercept and the terms."""
        return np.array([_row(levels(arm), terms) for arm in arms])

    @lru_cache(maxsize=4096)  # noqa: B019 (a design is a small constant)
    def weights(self, term: Term, present: tuple[str, ...]) -> Values | None:
        """Least squares as weights [arms] of these arms' values; None if they do not determine the effect.

        A main effect is the mean of (level - off) over all settings of the other factors, levels left out that it never
        met; an interaction the mean of ((both) - (first)) - ((second) - (neither)): by how much one effect changes when
        the other is on.
        """
        terms = [*self.mains, *self.pairs]
        X = self.rows(present, terms)
        others = {
            f: [lv for lv in names if lv == "off" or all(self._met(pair, (f, lv)) for pair in term)]
            for f, names in self.factors.items()
            if f not in dict(term)
        }
        contrast = np.zeros(X.shape[1])
        for setting in product(*others.values()):
            rest = dict(zip(others, setting, strict=True))
            for chosen in product((False, True), repeat=len(term)):
                on = dict(pair for pair, c in zip(term, chosen, strict=True) if c)
                contrast += (-1) ** (len(term) - len(on)) * _row(rest | on, terms)
        contrast /= np.prod([len(names) for names in others.values()])
        w = np.linalg.pinv(X).T @ contrast
        return w if np.allclose(X.T @ w, contrast, atol=1e-8) else None

    def _met(self, one: tuple[str, str], other: tuple[str, str]) -> bool:
        return (one, other) in self.pairs or (other, one) in self.pairs

    def determined(self) -> "Design":
        """This design, without interactions that keep its arms from determining every main effect."""
        if self._mains_determined():
            return self
        dropped = set(self.pairs)
        for pair in self.pairs:
            trial = replace(self, dropped=tuple(p for p in self.pairs if p in dropped - {pair}))
            dropped -= {pair} if trial._mains_determined() else set()
        return replace(self, dropped=tuple(p for p in self.pairs if p in dropped))

    def _mains_determined(self) -> bool:
        return all(self.weights(term, self.arms) is not None for term in self.mains)


def _has(setting: Mapping[str, str], term: Term) -> bool:
    return all(setting.get(factor) == level for factor, level in term)


def _row(setting: Mapping[str, str], terms: Sequence[Term]) -> Values:
    return np.array([1.0, *(float(_has(setting, term)) for term in terms)])


@dataclass(frozen=True)
class Noise:
    """With one seed: the deviation of a single cell by Lenth's method, from these standardised contrasts; or silent:
    the response is the same in every run."""

    contrasts: dict[str, float] = field(default_factory=dict)
    silent: bool = False

    @property
    def deviation(self) -> float:
        """Lenth's pseudo standard error; nan with fewer than seven contrasts."""
        if self.silent:
            return 0.0
        size = np.abs(list(self.contrasts.values()))
        if len(size) < _LENTH:
            return nan
        first = 1.5 * np.median(size)
        return float(1.5 * np.median(size[size <= 2.5 * first]))

    def estimate(self, value: float, length: float) -> Estimate:
        """A difference whose weights have this Euclidean length."""
        return Estimate(value, self.deviation * length, len(self.contrasts) / 3, 1)


def noise(table: Table, exact: Collection[str] = (), without: Collection[str] = ()) -> Noise:
    """Standardised contrasts of a table with one seed, of every order that its arms determine.

    exact: factors that cannot change the response: their contrasts are nearly zero whatever the noise, and left out.
    without: arms to leave out.
    """
    arms = sorted({arm for arm, _ in table if in_factorial(arm) and arm not in without})
    design = Design(tuple(arms))
    names = list(design.factors)
    terms = [
        tuple(zip(chosen, setting, strict=True))
        for order in range(1, len(names) + 1)
        for chosen in combinations(names, order)
        for setting in product(*(design.factors[f][1:] for f in chosen))
    ]
    y = np.array([value.mean() for arm in arms for (a, _), value in table.items() if a == arm])
    basis, out = np.ones((len(arms), 1)) / sqrt(max(len(arms), 1)), {}
    for term, column in zip(terms, design.rows(arms, terms).T[1:] if arms else (), strict=False):
        column = column - basis @ (basis.T @ column)
        if (length := float(np.linalg.norm(column))) > 1e-8:
            basis = np.column_stack([basis, column / length])
            if not {factor for factor, _ in term} & set(exact):
                out[label(term)] = float(basis[:, -1] @ y)
    return Noise(out)


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


def effects(table: Table, single: Noise | None = None, without: Collection[str] = ()) -> Effects:
    """Main effects and interactions of a response; cells that are missing are fitted without.

    single: the noise of a table with one seed. without: arms to leave out (a baseline that is another model). A seed
    whose arms do not determine an effect is left out of this effect; interactions that cannot be told from main effects
    are left out of the model.
    """
    table = {cell: y for cell, y in table.items() if in_factorial(cell[0]) and cell[0] not in without}
    present = {seed: tuple(sorted(arm for arm, s in table if s == seed)) for seed in {s for _, s in table}}
    design = Design(tuple(sorted({arm for arm, _ in table}))).determined()
    out, lost = [], []
    for term in (*design.mains, *design.pairs):
        d, length = [], 0.0
        for seed, arms in sorted(present.items()):
            if (w := design.weights(term, arms)) is not None:
                d.append(sum(weight * table[arm, seed] for weight, arm in zip(w, arms, strict=True)))
                length = float(np.linalg.norm(w))
        if not d:
            lost.append(term)
            continue
        found = estimate(np.array(d))
        out.append(Effect(term, single.estimate(found.value, length) if single else found))
    return Effects(design, out, lost)


def difference(table: Table, arm: str, other: str, single: Noise | None = None) -> Estimate | None:
    """One arm minus another, within seeds that have both; None without such a seed. (Lenth's deviation is too large for
    two arms where exact optimizations double the arms.)"""
    seeds = sorted({s for a, s in table if a == arm} & {s for a, s in table if a == other})
    if not seeds:
        return None
    found = estimate(np.array([table[arm, s] - table[other, s] for s in seeds]))
    return single.estimate(found.value, sqrt(2)) if single else found
