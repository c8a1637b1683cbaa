"""Intervals against simulation and scipy's bootstrap."""

import numpy as np
import pytest
from scipy import stats

from ablations.analysis import estimates
from ablations.analysis.estimates import Estimate


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("by_seed", "by_image", "by_both"), [(1, 5, 5), (0, 5, 5), (0.5, 0, 5), (1, 0, 0)])
def test_seeds_and_images_are_both_samples(by_seed, by_image, by_both, parts):
    """parts: into which images are divided, of which seeds in turn hold out one."""
    rng, hits, n = np.random.default_rng(4), 0, 400
    held_out = np.arange(120) // (120 // parts) == (np.arange(4) % parts)[:, None]
    for _ in range(n):
        d = 1 + by_seed * rng.standard_normal((4, 1)) + by_image * rng.standard_normal((1, 120))
        d = np.where(held_out, d + by_both * rng.standard_normal((4, 120)), np.nan)
        low, high = estimates.estimate(d).interval()
        hits += low <= 1 <= high
    assert 0.95 - 3 * np.sqrt(0.95 * 0.05 / n) < hits / n < 0.995


def test_standard_errors_are_the_bootstraps():
    """One way at a time, corrected for the seeds' small number; scipy's resampling is independent of our formula."""
    rng = np.random.default_rng(5)
    d = rng.standard_normal((8, 1)) + 6 * rng.standard_normal((1, 300))
    found = estimates.estimate(d)
    seeds, images = (
        stats.bootstrap((d.mean(axis),), np.mean, n_resamples=4000, method="percentile", rng=rng).standard_error
        for axis in (1, 0)
    )
    assert found.se**2 - found.fixed == pytest.approx(seeds**2 * 8 / 7, rel=0.06)
    assert found.fixed == pytest.approx(images**2, rel=0.06)


def test_a_bootstrap_over_few_seeds_covers_too_little():
    """Why the intervals are Student's: percentile bootstrap of the mean of 5 seeds."""
    rng, n = np.random.default_rng(6), 1000
    d = rng.standard_normal((n, 5))
    draws = np.take_along_axis(d[:, None], rng.integers(0, 5, (n, 1000, 5)), axis=2).mean(2)
    low, high = np.quantile(draws, (0.025, 0.975), axis=1)
    assert np.mean((low <= 0) & (high >= 0)) < 0.88
    student = [estimates.estimate(row[:, None]).interval() for row in d]
    assert np.mean([low <= 0 <= high for low, high in student]) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("seeds", [2, 3])
def test_two_seeds_and_images_keep_their_confidence(seeds):
    """Where the seeds' variance is small by luck, degrees of freedom taken from it would be many."""
    rng, n = np.random.default_rng(14), 600
    single, together = [], []
    for _ in range(n):
        part, fixed = rng.standard_normal(seeds).var(ddof=1) / seeds, 0.1 / seeds
        mean = rng.standard_normal() * np.sqrt(1 / seeds + fixed)
        found = Estimate(mean, np.sqrt(part + fixed), seeds - 1, seeds, fixed)
        low, high = found.interval()
        single.append(low <= 0 <= high)
        low, high = found.interval(of=14)
        together.append(low <= 0 <= high)
    assert np.mean(single) > 0.95 - 3 * np.sqrt(0.95 * 0.05 / n)
    assert np.mean(together) > 0.95 ** (1 / 14) - 3 * np.sqrt(0.0037 / n)


@pytest.mark.parametrize("half", [0.5, 1.0, 5.0])
def test_seeds_for_an_interval_are_the_fewest(half):
    found = Estimate(0.0, 2 / np.sqrt(5), 4, 5)
    needed = estimates.seeds_for(half, found)
    halves = [stats.t.ppf(0.975, n - 1) * 2 / np.sqrt(n) for n in (needed - 1, needed) if n > 1]
    assert halves[-1] <= half
    assert needed == 2 or halves[0] > half


def test_too_few_images_are_not_mended_by_seeds():
    found = Estimate(0.0, 0.01, 10, 5, fixed=0.009**2)
    assert estimates.seeds_for(0.002, found) is None
    assert estimates.seeds_for(0.04, found) is not None
