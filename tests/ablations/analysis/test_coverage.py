"""How often intervals and verdicts are right, by simulation."""

import numpy as np
import pytest
from scipy import stats

from ablations.analysis import effects, estimates, factors
from ablations.analysis.timing import Timing
from ablations.analysis.verdicts import judge
from ablations.study import arms

NAMES = [arm for arm in arms.lattice() if "flash" not in arm]  # exact twins are one arm
STUDIES = 400


def table(rng, seeds, spread=None, slopes=0.0, shift=0.0):
    """Cells without any effect but for `shift` of mrt; spread: an arm's deviation; slopes: the deviation over seeds of
    every optimization's own effect."""
    common, own = rng.standard_normal(seeds), slopes * rng.standard_normal((seeds, 4))
    parts = ("crs@0.5", "crs@0.3", "decatt", "mrt")
    out = {}
    for arm in NAMES:
        has = np.array([part in arm.split("+") for part in parts])
        deviation = (spread or {}).get(arm, 1.0)
        noise = deviation * rng.standard_normal(seeds)
        y = common + own @ has + shift * has[-1] + noise
        out |= {(arm, s): y[[s]] for s in range(seeds)}
    return out


def unequal(rng):
    """Half of the arms three times as noisy as the others."""
    return dict(zip(NAMES, rng.permutation([1.0, 3.0] * (len(NAMES) // 2)), strict=True))


CASES = {
    "equal": lambda rng: {},
    "unequal": lambda rng: {"spread": unequal(rng)},
    "one optimization noisy": lambda rng: {"spread": {a: 3.0 if "crs" in a else 1.0 for a in NAMES}},
    "optimizations vary by seed": lambda rng: {"slopes": 0.9},
}


def alone(differences, weights):
    """Every contrast with its own variance: the method that moderation replaces."""
    return [estimates.estimate(d) for d in differences]


def coverage(found):
    """Over studies: the share of single intervals that hold, of studies whose intervals all hold together, and both
    mean widths; the truth is 0."""
    single, together, widths = [], [], []
    for these in found:
        ends = np.array([[*e.interval(), *e.interval(of=len(these))] for e in these])
        single.append(((ends[:, 0] <= 0) & (ends[:, 1] >= 0)).mean())
        together.append(((ends[:, 2] <= 0) & (ends[:, 3] >= 0)).all())
        widths.append([(ends[:, 1] - ends[:, 0]).mean(), (ends[:, 3] - ends[:, 2]).mean()])
    return np.mean(single), np.mean(together), np.mean(widths, axis=0)


def mains(table, estimator=estimates.moderated):
    return [e.estimate for e in effects.fit(table, estimator=estimator).of_order(1)]


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("case", CASES)
def test_intervals_of_main_effects_hold(seeds, case):
    rng = np.random.default_rng(seeds)
    studies = [table(rng, seeds, **CASES[case](rng)) for _ in range(STUDIES)]
    single, together, widths = coverage(map(mains, studies))
    error = 3 * np.sqrt(0.95 * 0.05 / STUDIES)
    assert single > 0.95 - error / 2  # effects of a study are independent in part: about four times as many
    assert together > 0.95 - error
    _, _, before = coverage([mains(one, alone) for one in studies])
    print(f"{seeds} seeds, {case}: {single:.3f} {together:.3f} widths {widths / before}")
    assert widths[1] < 0.6 * before[1] if seeds == 3 else widths[1] < before[1]


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("case", CASES)
def test_intervals_of_arms_against_the_baseline_hold(seeds, case):
    rng, groups = np.random.default_rng(seeds), [[(arm, "baseline")] for arm in NAMES[1:]]
    studies = [effects.differences(table(rng, seeds, **CASES[case](rng)), groups) for _ in range(STUDIES)]
    single, together, _ = coverage(studies)
    print(f"{seeds} seeds, {case}: {single:.3f} {together:.3f}")
    assert single > 0.95 - 3 * np.sqrt(0.95 * 0.05 / STUDIES)  # all share the baseline's noise
    assert together > 0.95 - 3 * np.sqrt(0.95 * 0.05 / STUDIES)


@pytest.mark.parametrize("images", [1, 60])
def test_moderation_keeps_the_mean_and_never_trusts_a_small_variance(images):
    rng = np.random.default_rng(1)
    differences = [scale * rng.standard_normal((3, images)) for scale in (0.01, 1.0, 1.0, 3.0)]
    found = estimates.moderated(differences, np.eye(4))
    for d, e in zip(differences, found, strict=True):
        own = estimates.estimate(d)
        assert e.value == own.value
        assert e.fixed == own.fixed
        assert e.se >= own.se
    assert found[0].se > 10 * estimates.estimate(differences[0]).se


def test_the_posterior_variance_by_hand():
    """Two orthogonal contrasts of variances 1 and 4 of a cell: their mean is 2.5; the second keeps its own."""
    d = [np.array([[-1.0], [0.0], [1.0]]), np.array([[-2.0], [0.0], [2.0]]) * np.sqrt(2)]
    first, second = estimates.moderated(d, np.array([[1.0, 0, 0], [0, 1.0, 1.0]]))
    assert first.se**2 == pytest.approx((1 + 2 * 2.5) / 3 / 3)
    assert second.se**2 == pytest.approx(4 * 2 / 3)
    assert first.df == second.df == pytest.approx(4)  # 3 x 2, but the mean has 4


@pytest.mark.parametrize("rounds", [5, 8, 12, 20])
@pytest.mark.parametrize("disturbed", [0.0, 0.1])
def test_intervals_of_step_time_hold(rounds, disturbed):
    """24 arms in rounds that drift, blocks of which something else slows down."""
    rng, names, n = np.random.default_rng(rounds), arms.lattice(), 60
    found, plain = [], []
    for _ in range(n):
        logs = rng.standard_normal((rounds, len(names))) + 5 * rng.standard_normal((rounds, 1))
        logs += (rng.random(logs.shape) < disturbed) * rng.exponential(10, logs.shape)
        blocks = [list(zip(names, took, strict=True)) for took in np.exp(logs / 100)]
        found.append(mains(Timing(blocks, True).table, estimates.winsorized))
        raw = {(arm, i): np.array([x]) for arm, y in zip(names, logs.T / 100, strict=True) for i, x in enumerate(y)}
        plain.append(mains(raw, alone))
    single, together, widths = coverage(found)
    _, _, before = coverage(plain)
    print(f"{rounds} rounds, {disturbed:.0%} disturbed: {single:.3f} {together:.3f} widths {widths / before}")
    assert single > 0.95 - 3 * np.sqrt(0.95 * 0.05 / n / 4)
    assert together > 0.95 - 3 * np.sqrt(0.95 * 0.05 / n)
    if rounds >= 12:
        assert (widths / before < (0.5 if disturbed else 1.3)).all()


def test_winsorized_values_and_errors_are_scipys():
    x = np.random.default_rng(2).standard_normal(20)
    table = Timing([[("baseline", 1.0), ("flash", y), ("mrt", 1.0)] for y in np.exp(x)], True).table
    drawn = np.array([table["flash", i].item() for i in range(20)])
    assert drawn == pytest.approx(np.asarray(stats.mstats.winsorize(x, (0.2, 0.2))))
    (found,) = estimates.winsorized([drawn[:, None]], np.empty(0))
    assert found.value == pytest.approx(drawn.mean())
    assert found.se == pytest.approx(stats.sem(drawn) * 19 / 11)
    assert found.df == 11


def test_arms_of_different_groups_are_compared_through_the_baseline():
    """crs is timed beside the baseline while the machine is fast, mrt while it is slow; their difference is known."""
    rng = np.random.default_rng(3)
    groups = [{"baseline": 1, "crs@0.3": 3}] * 12 + [{"baseline": 5, "mrt": 5 * 0.5}] * 12
    blocks = [[(arm, s * np.exp(rng.normal(0, 0.01))) for arm, s in group.items()] for group in groups]
    table = Timing(blocks, True).table
    pairs = {("mrt", "crs@0.3"): 1 / 6, ("crs@0.3", "baseline"): 3, ("mrt", "baseline"): 0.5}
    for found, truth in zip(
        effects.differences(table, [[p] for p in pairs], estimates.winsorized), pairs.values(), strict=True
    ):
        low, high = found.interval(0.999)
        assert low < np.log(truth) < high < low + 0.1


@pytest.mark.parametrize("truth", [-1.0, 0.0])
def test_verdicts_are_rarely_wrong_and_stopping_keeps_it(truth):
    """mrt is worse by just the margin ("no worse" and "better" are wrong), or does nothing ("better", "worse" are);
    after each seed from the second to the eighth training stops if all is decided."""
    rng, looks, margin = np.random.default_rng(7), range(2, 9), 1.0
    wrong, stopped = [], []
    bad = {"mrt": ("no worse", "better") if truth else ("worse", "better")}
    for _ in range(250):
        whole = table(rng, max(looks), shift=truth)
        for seeds in looks:
            found = effects.fit({key: y for key, y in whole.items() if key[1] < seeds}).of_order(1)
            ends = {factors.label(e.term): e.estimate.interval(1 - 0.05 / len(looks), len(found)) for e in found}
            told = {name: judge(*end, margin) for name, end in ends.items()}
            if "undecided" not in told.values():
                break
        stopped.append(seeds)
        wrong.append(any(word in bad.get(name, ("worse", "better")) for name, word in told.items()))
    print(truth, np.mean(wrong), np.mean(stopped))
    assert np.mean(wrong) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 250)
    assert min(stopped) < max(looks)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.2, 3.0, "better"), (-3.0, -0.2, "worse"), (-0.9, 3.0, "no worse"), (-1.1, 3.0, "undecided"),
        (-0.9, -0.2, "no worse"), (0.2, 0.9, "no worse"), (-1.1, 0.5, "undecided"), (0.0, 0.0, "no worse"),
        (np.nan, np.nan, "undecided"), (-1.1, -1.1, "worse"), (1.1, 1.1, "better"),
    ],
)  # fmt: skip
def test_a_verdict_reads_its_interval(low, high, verdict):
    assert judge(low, high, 1.0) == verdict
