"""Effects against planted ones, statsmodels' OLS and scipy."""

import itertools

import numpy as np
import pandas as pd
import pytest
from statsmodels.formula.api import ols

from ablations.analysis import effects, estimates, factors
from ablations.analysis.design import Design
from ablations.study import arms

FACTORS = {"crs": ("off", "0.3", "0.5"), "decatt": ("off", "on"), "flash": ("off", "on"), "mrt": ("off", "on")}
SETTINGS = [dict(zip(FACTORS, levels, strict=True)) for levels in itertools.product(*FACTORS.values())]
LATTICE = arms.lattice()  # decatt, flash and mrt off and on, crs off, 0.5 and 0.3
TRUTH = {
    (("crs", "0.3"),): -0.05,
    (("crs", "0.5"),): -0.02,
    (("decatt", "on"),): 0.03,
    (("mrt", "on"),): 0.01,
    (("crs", "0.3"), ("mrt", "on")): -0.04,
    (("decatt", "on"), ("flash", "on")): 0.02,
}


def shares(arm):
    """How much of each true term an arm has; of an interaction a share in every setting, so that main effects stay."""
    setting = factors.levels(arm)
    mine = {term: [setting.get(f) == level for f, level in term] for term in TRUTH}
    even = {term: [1 / len(FACTORS[f]) if len(term) > 1 else 0 for f, _ in term] for term in TRUTH}
    return [np.prod(np.subtract(mine[term], even[term])) for term in TRUTH]


SHARES = {arm: np.array(shares(arm)) for arm in LATTICE}


def planted(rng, seeds, noise=0.01, names=LATTICE):
    """Cells of a linear model; seeds, seeds by term, and cells vary."""
    table = {}
    for seed in range(seeds):
        own = np.array(list(TRUTH.values())) + noise * rng.standard_normal(len(TRUTH))
        common = rng.standard_normal()
        for arm in names:
            table[arm, seed] = np.array([common + SHARES[arm] @ own + noise * rng.standard_normal()])
    return table


def test_arms_are_cells_of_a_factorial():
    assert factors.levels("crs@0.3+flash") == {"crs": "0.3", "flash": "on"}
    assert factors.levels("baseline") == factors.levels("baseline-again") == {}
    design = Design(tuple(LATTICE))
    assert design.factors == {
        "crs": ["off", "0.3", "0.5"], "decatt": ["off", "on"], "flash": ["off", "on"], "mrt": ["off", "on"]
    }  # fmt: skip
    assert len(design.mains) == 5
    assert len(design.pairs) == 9
    assert not factors.in_factorial("recompute")
    assert not factors.in_factorial("baseline-again")


def test_planted_effects_are_found_exactly_without_noise():
    found = {e.term: e.estimate for e in effects.fit(planted(np.random.default_rng(0), 3, noise=0)).effects}
    for term, estimate in found.items():
        assert estimate.value == pytest.approx(TRUTH.get(term, 0.0), abs=1e-12)
        assert estimate.interval()[1] - estimate.interval()[0] < 1e-12


@pytest.mark.parametrize("missing", [[], ["crs@0.3+decatt", "mrt"], ["baseline"]])
def test_estimates_are_statsmodels_ols(missing):
    table = planted(np.random.default_rng(1), 4, names=[a for a in LATTICE if a not in missing])
    rows = [
        {
            "seed": seed,
            "y": y.item(),
            **{f: factors.levels(arm).get(f, "off") for f in FACTORS},
        }
        for (arm, seed), y in table.items()
    ]
    model = "y ~ C(seed) + (C(crs, Sum) + C(decatt, Sum) + C(flash, Sum) + C(mrt, Sum)) ** 2"
    fit = ols(model, pd.DataFrame(rows)).fit()
    frame = pd.DataFrame([{"seed": 0, **setting} for setting in SETTINGS])
    frame["y"] = fit.predict(frame)
    found = effects.fit(table)
    assert len(found.effects) == 14
    assert not found.lost
    for term, estimate in found.effects:
        reduced = frame
        for factor, level in term:
            mean = reduced.groupby([c for c in reduced.columns if c != "y"])["y"].mean().reset_index()
            on, off = (mean[mean[factor] == lv].drop(columns=factor) for lv in (level, "off"))
            keys = [c for c in on.columns if c != "y"]
            both = on.merge(off, on=keys, suffixes=("", "_off"))
            both["y"] = both["y"] - both["y_off"]
            reduced = both[[*keys, "y"]]
        assert estimate.value == pytest.approx(reduced["y"].mean(), abs=1e-10)


def test_the_interval_of_numbers_is_statsmodels():
    """Seeds alone: the intercept of the effects within seeds."""
    table = planted(np.random.default_rng(2), 5)
    baseline, decatt = (np.array([table[arm, s].item() for s in range(5)]) for arm in ("baseline", "decatt"))
    fit = ols("d ~ 1", pd.DataFrame({"d": decatt - baseline})).fit()
    (found,) = effects.differences(table, [[("decatt", "baseline")]])
    assert found.value == pytest.approx(fit.params["Intercept"])
    assert found.interval() == pytest.approx(tuple(fit.conf_int(0.05).loc["Intercept"]))
    assert found.interval(0.99) == pytest.approx(tuple(fit.conf_int(0.01).loc["Intercept"]))


def test_missing_cells_are_fitted_without():
    rng = np.random.default_rng(7)
    table = planted(rng, 3, noise=0)
    for cell in (("crs@0.3+mrt", 0), ("baseline", 1), ("decatt+flash", 2)):
        del table[cell]
    for term, estimate in effects.fit(table).effects:
        assert estimate.value == pytest.approx(TRUTH.get(term, 0.0), abs=1e-12)
        assert estimate.seeds == 3


def test_what_the_arms_do_not_determine_is_named():
    names = ["baseline", "flash", "decatt", "mrt+flash", "mrt+decatt+flash"]
    rng = np.random.default_rng(8)
    found = effects.fit({(arm, s): rng.standard_normal(1) for arm in names for s in (0, 1)})
    assert [factors.label(e.term) for e in found.effects] == ["decatt", "flash", "mrt", "decatt × flash"]
    assert {factors.label(term) for term in found.design.apart} == {"decatt × mrt", "flash × mrt"}
    table = {(arm, s): rng.standard_normal(1) for arm in ("flash", "decatt+flash") for s in (0, 1)}
    assert [factors.label(term) for term in effects.fit(table).lost] == ["flash"]
    alone = effects.fit({(arm, s): rng.standard_normal(1) for arm in ("baseline", "flash", "mrt") for s in (0, 1)})
    assert [factors.label(term) for term in alone.design.apart] == ["flash × mrt"]
    assert [factors.label(e.term) for e in alone.effects] == ["flash", "mrt"]


def test_a_level_that_met_no_other_changes_no_other_effect():
    rng = np.random.default_rng(12)
    table = {(arm, s): rng.standard_normal(1) for arm in arms.PUBLISHED for s in range(3)}
    more = table | {("decatt@10", s): rng.standard_normal(1) for s in range(3)}
    before, after = ({factors.label(e.term): e.estimate for e in effects.fit(t).effects} for t in (table, more))
    for name, estimate in before.items():
        assert after[name].value == pytest.approx(estimate.value, abs=1e-12)


def test_equal_arms_have_no_effect_by_rounding():
    """flash's numbers are the baseline's to the last bit: no effect, no interval."""
    rng = np.random.default_rng(13)
    table = {}
    for seed in range(5):
        for arm in arms.PUBLISHED:
            twin = "+".join(part for part in arm.split("+") if part != "flash") or "baseline"
            table[arm, seed] = table[twin, seed] if (twin, seed) in table else (rng.random(360) < 0.9).astype(float)
    flash = next(e.estimate for e in effects.fit(table).effects if factors.label(e.term) == "flash")
    assert (flash.value, flash.se, flash.interval()) == (0, 0, (0, 0))


def test_an_exact_factor_does_not_count_as_a_replicate():
    """flash's accuracies are the baseline's: twice the arms tell nothing more of decatt."""
    rng = np.random.default_rng(9)
    half = {(arm, s): rng.standard_normal(1) for arm in ("baseline", "decatt") for s in range(4)}
    twice = half | {
        (arm, s): half[other, s] for arm, other in (("flash", "baseline"), ("decatt+flash", "decatt")) for s in range(4)
    }
    once, again = (
        next(e.estimate for e in effects.fit(table).effects if factors.label(e.term) == "decatt")
        for table in (half, twice)
    )
    assert again.interval() == pytest.approx(once.interval())


def test_one_seed_has_no_interval():
    table = {(arm, 0): np.array([float(i)]) for i, arm in enumerate(("baseline", "flash", "mrt"))}
    (flash, _) = effects.fit(table).effects
    assert flash.estimate.value == pytest.approx(1)
    assert np.isnan(flash.estimate.interval()).all()
    assert estimates.seeds_for(0.1, flash.estimate) is None


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["crs", "recompute"], [("crs", "crs", "recompute")]),  # --set crs.ratio=0.3
        (["crs@0.3+flash", "flash+recompute"], [("crs@0.3", "crs@0.3+flash", "flash+recompute")]),
        (["crs@0.3+flash", "recompute"], []),
        (["mrt@32", "uniform", "mrt+crs@0.5", "mrt+recompute"],
         [("mrt@32", "mrt@32", "uniform"), ("crs@0.5", "mrt+crs@0.5", "mrt+recompute")]),
        (["baseline", "flash", "recompute", "baseline-again"], []),
    ],
)  # fmt: skip
def test_each_optimization_stands_beside_its_own_control(names, pairs):
    assert factors.controlled(names) == pairs


def test_half_a_lattice_tells_main_effects_and_names_its_aliases():
    """Of four factors every interaction is the complementary one's; of five none is."""
    four = Design(tuple(arms.half(("decatt", "droppath", "flash", "tome"))))
    names = [{factors.label(pair) for pair in pairs} for pairs in four.determined().aliases]
    assert names == [
        {"decatt × droppath", "flash × tome"}, {"decatt × flash", "droppath × tome"},
        {"decatt × tome", "droppath × flash"},
    ]  # fmt: skip
    main = {arm: 0.03 * ("decatt" in arm) + 0.02 * ("tome" in arm) for arm in four.arms}
    crossed = {arm: 0.04 * (("flash" in arm) - 0.5) * (("tome" in arm) - 0.5) for arm in four.arms}
    table = {(arm, seed): np.array([seed + main[arm] + crossed[arm]]) for arm in four.arms for seed in range(3)}
    found = effects.fit(table)
    assert {factors.label(e.term): round(e.estimate.value, 9) for e in found.effects} == {
        "decatt": 0.03, "droppath": 0, "flash": 0, "tome": 0.02
    }  # fmt: skip
    assert found.lost == four.pairs
    assert not Design(tuple(arms.half(("decatt", "droppath", "flash", "mrt", "tome")))).aliases
    assert not Design(tuple(LATTICE)).aliases


def test_a_study_of_many_optimizations_is_fitted_in_no_time():
    """A main effect's contrast is a mean over all settings of the others, which are too many to be gone through."""
    alone = list("abcdefghijklmnopqrstuvw")
    names = ["baseline", *alone, "flash", *(f"{name}+flash" for name in alone)]
    table = {(arm, 0): np.array([float(len(arm))]) for arm in names}
    assert len(effects.fit(table).of_order(1)) == len(alone) + 1


def test_beside_a_lattice_an_effect_is_that_of_its_own_pairs():
    """Interactions of three in the lattice, which the model lacks, are no effect of an exact arm outside of it."""
    rng = np.random.default_rng(5)
    values = {arm: rng.normal(size=1) for arm in [*LATTICE, "patchdrop"]}
    values |= {"readout": values["baseline"], "flash+readout": values["flash"]}
    table = {(arm, seed): value for arm, value in values.items() for seed in range(3)}
    found = {factors.label(e.term): e.estimate.value for e in effects.fit(table).of_order(1)}
    assert found["readout"] == 0
    assert found["patchdrop"] == pytest.approx(float(values["patchdrop"][0] - values["baseline"][0]), abs=1e-12)
    whole = {
        factors.label(e.term): e.estimate.value
        for e in effects.fit({k: table[k] for k in table if k[0] in LATTICE}).of_order(1)
    }
    assert found["mrt"] == pytest.approx(whole["mrt"], abs=1e-12)
