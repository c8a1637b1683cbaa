"""Mean differences with their intervals: over seeds and images, over the rounds of a timing pass; what would narrow
them."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import isnan, nan, sqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from core.measure import winsorized_mean

Values = NDArray[np.float64]
CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A difference, its standard error (nan: not to be had), and the seeds (or rounds) it comes from.

    fixed: the part of the squared standard error that more seeds do not lessen: the images are a sample too.
    df: degrees of freedom of the other part.
    """

    value: float
    se: float
    df: float
    seeds: int
    fixed: float = 0.0

    def interval(self, confidence: float = CONFIDENCE, of: int = 1) -> tuple[float, float]:
        """An interval of at least this confidence: Student's quantile for the seeds, the normal one for the images
        (Banerjee, Sankhya 22, 1960; in no library). of: how many such intervals shall hold together (Šidák, JASA 62,
        1967)."""
        half = self._half((1 + confidence ** (1 / of)) / 2)
        return self.value - half, self.value + half

    def _half(self, quantile: float) -> float:
        if self.se == 0:
            return 0.0
        seeds = max(self.se**2 - self.fixed, 0.0)
        t, z = _quantiles(quantile, self.df)
        return sqrt(t * t * seeds + z * z * self.fixed) if seeds else z * self.se

    def described(self, of: int, confidence: float = CONFIDENCE) -> dict[str, Any]:
        """A row of a table: the estimate with its interval alone, and with the one that holds together with others."""
        low, high = self.interval(confidence)
        low_together, high_together = self.interval(confidence, of)
        return {
            "estimate": self.value, "se": self.se, "df": self.df, "seeds": self.seeds,
            "low": low, "high": high, "low_together": low_together, "high_together": high_together,
        }  # fmt: skip


@lru_cache(maxsize=1024)
def _quantiles(quantile: float, df: float) -> tuple[float, float]:
    """Student's and the normal one."""
    return float(stats.t.ppf(quantile, df)), float(stats.norm.ppf(quantile))


Estimator = Callable[[Sequence[Values], Values], list[Estimate]]
"""Contrasts, each as its differences [S,I] within seeds, and their weights [contrasts, arms] -> their estimates."""


def estimate(d: Values) -> Estimate:
    """The mean of differences d [S,I] over seeds and images, both being samples; nan: a seed does not hold out this
    image. Two seeds hold out the same images or none in common.

    Its variance is that of the seeds plus that of the images less their interaction, which is in both (Cameron, Gelbach
    and Miller, J. Business and Economic Statistics 29, 2011): the covariance of seeds over the images that they share.
    The seeds' cannot be below the interaction's. (A bootstrap over 3 or 5 seeds covers the truth in 75 or 84 % of the
    cases; statsmodels' clustered covariances take two groups, but count neither's degrees of freedom.)
    """
    d = d.round(12)  # or rounding would pass for an effect where nothing differs
    S, there = len(d), ~np.isnan(d)
    by_seed = np.nanmean(d, 1)
    value = float(by_seed.mean())
    if S < 2:
        return Estimate(value, nan, nan, S)
    rest, shared = np.where(there, d - by_seed[:, None], 0.0), there.astype(float) @ there.T
    of_mean = rest @ rest.T / np.maximum(shared * (shared - 1), 1)  # covariance of the seeds' means over images
    together = (shared > 0) & ~np.eye(S, dtype=bool)
    images = float(of_mean[together].mean()) if together.any() else 0.0
    fixed = max(images, 0.0) * together.sum() / (S * (S - 1))
    both = (float(of_mean.trace()) / S - images) / S if together.any() else 0.0
    return Estimate(value, sqrt(max(float(by_seed.var(ddof=1)) / S, both) + fixed), S - 1, S, fixed)


def moderated(differences: Sequence[Values], weights: Values) -> list[Estimate]:
    """Estimates of contrasts of one kind (main effects, say), each of whose variances over seeds is moderated by all.

    A contrast's variance over its squared weights' sum estimates the variance of a cell, and so does their mean m over
    the contrasts. As in Smyth (Stat. Appl. Genet. Mol. Biol. 3, 2004, eq. 3) the posterior of a variance v with f
    degrees of freedom is (f v + 2 f m) / 3 f, here never below v. The prior's 2 f are fixed: estimated from a handful
    of variances with 2 degrees of freedom, as limma does from thousands, they give intervals that hold too seldom
    (93 %). The means are of one kind because an optimization can vary from seed to seed as a whole, which is in its
    main effect only. Degrees of freedom: 3 f, at most those of m (of correlated contrasts: Satterthwaite, 1946).
    weights: [contrasts, arms], arms with equal values as one.
    """
    alone = [estimate(d) for d in differences]
    scales = (weights**2).sum(1)
    some = [i for i, e in enumerate(alone) if e.seeds > 1 and scales[i] > 1e-12]
    if not some:
        return alone
    own = np.array([alone[i].df for i in some])
    cell = np.array([max(alone[i].se ** 2 - alone[i].fixed, 0.0) * alone[i].seeds for i in some]) / scales[some]
    unit = weights[some] / np.sqrt(scales[some])[:, None]
    most = own.sum() * len(some) / ((unit @ unit.T) ** 2).sum()
    posterior = np.maximum(cell, (cell + 2 * np.average(cell, weights=own)) / 3)
    for i, variance, f in zip(some, posterior, own, strict=True):
        found = alone[i]
        se = sqrt(variance * scales[i] / found.seeds + found.fixed)
        alone[i] = found._replace(se=se, df=float(max(min(3 * f, most), f)))
    return alone


def winsorized(differences: Sequence[Values], weights: Values) -> list[Estimate]:
    """Estimates of contrasts within the rounds of a timing pass [R,1], of values drawn in before (see Timing.table)."""
    return [Estimate(*winsorized_mean(d.round(12)), len(d)) for d in differences]


def exact(differences: Sequence[Values], weights: Values) -> list[Estimate]:
    """Estimates of contrasts that nothing is random in: no standard error."""
    return [Estimate(float(d.mean().round(12)), 0.0, nan, len(d)) for d in differences]


def seeds_for(half: float, found: Estimate, of: int = 1, confidence: float = CONFIDENCE) -> int | None:
    """The fewest seeds of the same spread whose interval reaches at most `half` to either side; None if no number up to
    16,384 does: the images are too few. (statsmodels' power has no part that stays.)"""
    if isnan(found.se):
        return None
    spread = max(found.se**2 - found.fixed, 0.0) * found.seeds

    def reached(seeds: int) -> bool:
        df = found.df * (seeds - 1) / (found.seeds - 1)
        planned = Estimate(0.0, sqrt(spread / seeds + found.fixed), df, seeds, found.fixed)
        return planned.interval(confidence, of)[1] <= half

    needed = 2 + bisect_left(range(2, 2**14 + 1), True, key=reached)
    return needed if needed <= 2**14 else None
