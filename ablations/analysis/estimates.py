"""A mean difference over seeds and images: its interval, and how many seeds would narrow it."""

from bisect import bisect_left
from functools import lru_cache
from math import isnan, nan, sqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

Values = NDArray[np.float64]


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

    def clear(self, of: int = 1) -> bool:
        """Whether the interval excludes zero."""
        low, high = self.interval(of=of)
        return low > 0 or high < 0

    @property
    def above(self) -> float:
        """The confidence that the true difference is above 0: of the one-sided interval that ends there; 0.5 if both
        are equal."""
        if isnan(self.se):
            return nan
        if self.se == 0 or self.value == 0:
            return float(np.sign(self.value) + 1) / 2
        last = 1 - 1e-9
        size = abs(self.value)
        p = last if self._half(last) < size else optimize.brentq(lambda q: self._half(q) - size, 0.5, last)
        return float(p if self.value > 0 else 1 - p)

    def described(self, of: int) -> dict[str, Any]:
        """A row of a table: the estimate with its interval alone, and with the one that holds together with others."""
        low, high = self.interval()
        low_together, high_together = self.interval(of=of)
        return {
            "estimate": self.value, "se": self.se, "df": self.df, "seeds": self.seeds,
            "low": low, "high": high, "low_together": low_together, "high_together": high_together,
            "confidence_above": self.above,
        }  # fmt: skip


@lru_cache(maxsize=1024)
def _quantiles(quantile: float, df: float) -> tuple[float, float]:
    """Student's and the normal one."""
    return float(stats.t.ppf(quantile, df)), float(stats.norm.ppf(quantile))


def estimate(d: Values) -> Estimate:
    """The mean of differences d [S,I] over seeds and images, both being samples.

    Its variance is that of the seeds plus that of the images less their interaction, which is in both (Cameron, Gelbach
    and Miller, J. Business and Economic Statistics 29, 2011); the seeds' cannot be below the interaction's. (A
    bootstrap over 3 or 5 seeds covers the truth in 75 or 84 % of the cases; statsmodels' clustered covariances take two
    groups, but count neither's degrees of freedom.)
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


def seeds_for(half: float, found: Estimate, of: int = 1) -> int | None:
    """The fewest seeds of the same spread whose interval reaches at most `half` to either side; None if no number up to
    16,384 does: the images are too few. (statsmodels' power has no part that stays.)"""
    if isnan(found.se):
        return None
    spread = max(found.se**2 - found.fixed, 0.0) * found.seeds

    def reached(seeds: int) -> bool:
        df = found.df * (seeds - 1) / (found.seeds - 1)
        planned = Estimate(0.0, sqrt(spread / seeds + found.fixed), df, seeds, found.fixed)
        return planned.interval(of=of)[1] <= half

    high = next((2**i for i in range(1, 15) if reached(2**i)), None)
    if high is None:
        return None
    low = max(high // 2, 2)
    return low + bisect_left(range(low, high), True, key=reached)
