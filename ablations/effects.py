"""What each optimization does to a response: main effects and two-way interactions of a factorial study.

A response is a table: (arm, seed) -> values [I], the correctness of every validation image, or one number (I = 1).
An arm is a cell of a factorial: `crs@0.3+flash` has factor crs at 0.3, flash on, the others off. Within a seed all arms
share initial weights and data order, so each effect is first taken within every seed (and image), then over seeds:
arms that give nearly the same result (`flash` is exact) do not count as independent observations. One seed has no such
replicates; there the noise is told from the many effects that should be nothing (Lenth, Technometrics 31, 1989).
"""

from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import combinations, product
from math import isnan, nan, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from ablations.arms import AGAIN, BASELINE
from core.transforms import REGISTRY

Values = NDArray[np.float64]
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
    return arm != AGAIN and not any(name in REGISTRY and REGISTRY[name].control for name in levels(arm))


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


class Estimate(NamedTuple):
    """A difference, its standard error (nan: not to be had), and the seeds it comes from.

    fixed: the part of the squared standard error that more seeds do not lessen: the images are a sample too.
    df: degrees of freedom of the other part.
    """

    value: float
    se: float
    df: float
    seeds: int
    fixed: float = 0.0

    def interval(self, confidence: float = 0.95, of: int = 1) -> tuple[float, float]:
        """An interval of at least this confidence: Student's quantile for the seeds, the normal one for the images
        (Banerjee, Sankhya 22, 1960). of: how many such intervals shall hold together (Šidák, JASA 62, 1967)."""
        half = self._half((1 + confidence ** (1 / of)) / 2)
        return self.value - half, self.value + half

    def _half(self, quantile: float) -> float:
        if self.se == 0:
            return 0.0
        seeds = max(self.se**2 - self.fixed, 0.0)
        t, z = _quantiles(quantile, self.df)
        return sqrt(t * t * seeds + z * z * self.fixed) if seeds else z * self.se

    def clear(self, of: int = 1) -> bool:
        """Whether the interval excludes zero."""
        low, high = self.interval(of=of)
        return low > 0 or high < 0

    @property
    def above(self) -> float:
        """Probability that the true difference is above 0, by the interval's distribution; 0.5 if both are equal."""
        if self.se == 0 or self.value == 0:
            return float(np.sign(self.value) + 1) / 2
        last = 1 - 1e-9
        size = abs(self.value)
        p = last if self._half(last) < size else optimize.brentq(lambda q: self._half(q) - size, 0.5, last)
        return float(p if self.value > 0 else 1 - p)


@lru_cache(maxsize=1024)
def _quantiles(quantile: float, df: float) -> tuple[float, float]:
    """Student's and the normal one."""
    return float(stats.t.ppf(quantile, df)), float(stats.norm.ppf(quantile))


def estimate(d: Values) -> Estimate:
    """The mean of differences d [S,I] over seeds and images, both being samples.

    Its variance is that of the seeds plus that of the images less their interaction, which is in both (Cameron, Gelbach
    and Miller, J. Business and Economic Statistics 29, 2011); the seeds' cannot be below the interaction's. (A
    bootstrap over 3 or 5 seeds covers the truth in 75 or 84 % of the cases.)
    """
    d = d.round(12)  # or rounding would pass for an effect where nothing differs
    S, count = d.shape
    by_seed, by_image = d.mean(1), d.mean(0)
    if S < 2:
        return Estimate(float(d.mean()), nan, nan, S)
    seeds, both, fixed = float(by_seed.var(ddof=1)) / S, 0.0, 0.0
    if count > 1:
        rest = d - by_seed[:, None] - by_image + d.mean()
        both = float((rest**2).sum()) / ((S - 1) * (count - 1)) / (S * count)
        fixed = max(float(by_image.var(ddof=1)) / count - both, 0.0)
    variance = max(seeds, both) + fixed
    return Estimate(float(d.mean()), sqrt(variance), S - 1, S, fixed)


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


def power(size: float, found: Estimate, seeds: int, of: int = 1) -> float:
    """Probability that an effect of this size is told from zero with so many seeds of the same spread, by one of
    so many intervals that hold together; the statistic's degrees of freedom after Satterthwaite."""
    spread = max(found.se**2 - found.fixed, 0.0) * found.seeds
    variance = spread / seeds + found.fixed
    if isnan(variance) or seeds < 2:
        return nan
    if variance == 0:
        return 1.0
    df = min((seeds - 1) * (variance * seeds / spread) ** 2, 1e6) if spread else 1e6
    planned = Estimate(0.0, sqrt(variance), seeds - 1, seeds, found.fixed)
    critical, shift = planned.interval(of=of)[1] / sqrt(variance), size / sqrt(variance)
    tails = stats.nct.sf(critical, df, shift), stats.nct.cdf(-critical, df, shift)
    return float(np.nansum(tails))  # scipy gives nan for a tail that vanishes


def resolvable(found: Estimate, of: int = 1, chance: float = 0.8) -> float:
    """The smallest effect that this estimate's seeds tell from zero with the chance, by one of so many intervals."""
    if isnan(found.se) or found.se == 0 or found.seeds < 2:
        return 0.0 if found.se == 0 else nan
    steps = found.se * 2.0 ** np.arange(-4, 14)
    high = next((size for size in steps if power(size, found, found.seeds, of) >= chance), nan)
    if isnan(high):
        return nan
    return float(optimize.brentq(lambda size: power(size, found, found.seeds, of) - chance, 0.0, high))


def seeds_for(size: float, found: Estimate, of: int = 1, chance: float = 0.8) -> int | None:
    """The fewest seeds that tell an effect of this size from zero with the chance, by one of so many intervals; None if
    no number up to 16,384 does: the images are too few."""

    def reached(seeds: int) -> bool:
        return power(size, found, seeds, of) >= chance

    high = next((2**i for i in range(1, 15) if reached(2**i)), None)
    return None if high is None else high // 2 + bisect_left(range(high // 2, high), True, key=reached)
