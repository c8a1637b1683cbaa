"""Verdicts of studies in which what each optimization does was planted."""

import numpy as np
import pytest
from judged import NAMES, POINT, compared, study, timed, told

from ablations.analysis import verdicts
from ablations.analysis.estimates import seeds_for
from ablations.reporting import sections, words
from ablations.reporting.formatting import judged
from core.errors import InputError

CONTROLS = ["uniform", "flash+uniform"]


def test_ten_percent_more_time_and_nothing_else():
    rng, slower = np.random.default_rng(0), []
    for _ in range(20):
        found = told(compared(study(rng, names=NAMES), timed(rng, NAMES, {"flash": 1.1})))
        row = found["flash", "step time"]
        assert row["verdict"] == "worse"
        slower += [row["estimate"]]
        assert [found["flash", r]["verdict"] for r in ("accuracy", "peak memory")] == ["no worse"] * 2
        assert found["flash", "accuracy"]["low"] == found["flash", "accuracy"]["high"] == 0
        assert found["decatt", "step time"]["verdict"] != "worse"
    assert 8 < min(slower) <= max(slower) < 12


def test_enough_seeds_tell_that_accuracy_is_no_worse():
    rng = np.random.default_rng(1)
    found = told(compared(study(rng, seeds=5, images=20_000), timed(rng, NAMES), margins=POINT))
    assert {row["verdict"] for row in found.values()} == {"no worse"}


@pytest.mark.parametrize("shared", [False, True])
def test_lowered_accuracy_is_worse(shared):
    rng = np.random.default_rng(2)
    made = study(rng, seeds=4, images=2000, accuracy={"mrt": -0.06}, shared=shared)
    row = told(compared(made, timed(rng, NAMES)))["mrt", "accuracy"]
    assert row["verdict"] == "worse"
    assert row["low"] < -6 < row["high"] < 0
    assert row["seeds"] == 4


def test_verdicts_of_whole_studies_are_rarely_wrong():
    """mrt costs exactly the margin of accuracy and of time, the others nothing."""
    rng, wrong, n = np.random.default_rng(3), {"accuracy": [], "step time": []}, 150
    for _ in range(n):
        made = study(rng, accuracy={"mrt": -0.01}, images=300)
        found = told(compared(made, timed(rng, NAMES, {"mrt": 1.02}), margins=POINT))
        for response, list_ in wrong.items():
            bad = found["mrt", response]["verdict"] in ("better", "no worse")
            list_.append(bad or any(found[o, response]["verdict"] in ("better", "worse") for o in ("decatt", "flash")))
    for rate in map(np.mean, wrong.values()):
        assert rate < 0.05 + 3 * np.sqrt(0.05 * 0.95 / n)


def test_peak_memory_is_certain_and_small_changes_are_no_worse():
    rng = np.random.default_rng(4)
    found = told(compared(study(rng, seeds=1, peak={"flash": 0.8, "decatt": 0.995, "mrt": 1.05})))
    rows = {name: found[name, "peak memory"] for name in ("flash", "decatt", "mrt")}
    assert {name: row["verdict"] for name, row in rows.items()} == {
        "flash": "better", "decatt": "no worse", "mrt": "worse"
    }  # fmt: skip
    assert rows["decatt"]["within"]
    little = dict.fromkeys(("estimate", "low", "high"), 0.01)
    assert judged(rows["decatt"]) == "**no worse** (better, by less than the margin) −0.5"
    assert judged(rows["decatt"] | little) == "**no worse** 0.0"
    assert rows["flash"]["low"] == rows["flash"]["high"] == pytest.approx(-20, abs=1e-6)


def test_one_seed_and_no_timing_decide_nothing():
    comparisons = compared(study(np.random.default_rng(5), seeds=1))
    found = told(comparisons)
    assert found["mrt", "accuracy"]["verdict"] == "undecided"
    assert np.isnan(found["mrt", "accuracy"]["low"])
    assert found["mrt", "step time"]["verdict"] == "not timed"
    (sentence,) = (s for s in words.pays(comparisons) if s.startswith("`mrt`"))
    assert "accuracy: no interval: --seeds 3" in sentence
    assert "time not timed" in sentence


def test_optimizations_against_their_controls():
    """mrt and its control both add six points; mrt takes a tenth longer than the control."""
    rng, names = np.random.default_rng(6), [*NAMES, *CONTROLS]
    made = study(rng, seeds=4, names=names, images=4000, accuracy={"mrt": 0.06, "uniform": 0.06})
    comparisons = compared(made, timed(rng, names, {"mrt": 1.1}))
    found = told(comparisons)
    assert found["mrt", "accuracy"]["verdict"] == "better"
    assert found["mrt", "accuracy against control"]["verdict"] in ("no worse", "undecided")
    assert abs(found["mrt", "accuracy against control"]["estimate"]) < 2
    assert found["mrt", "step time against control"]["verdict"] == "worse"
    assert ("decatt", "accuracy against control") not in found
    (sentence,) = (s for s in words.pays(comparisons) if s.startswith("`mrt`"))
    assert "pays where accuracy counts: accuracy (+" in sentence
    assert "Against its control `uniform`: it costs time (+" in sentence
    table = sections.verdict_table(comparisons).set_index("optimization")
    assert table.loc["`mrt` against `uniform`", "step time, %"].startswith("**worse** +")
    assert "`decatt` against" not in "".join(table.index)
    assert found["uniform", "accuracy"]["verdict"] == "better"  # a row of its own
    right = {cell.key: 100 * cell.correct[-1].mean() for cell in made.cells}
    lead = np.mean([right["uniform", seed] - right["baseline", seed] for seed in range(4)])
    assert found["uniform", "accuracy"]["estimate"] == pytest.approx(lead)


def test_what_its_control_beats_does_not_pay():
    """mrt saves a tenth of the time, its control a fifth."""
    rng, names = np.random.default_rng(6), [*NAMES, *CONTROLS]
    comparisons = compared(study(rng, seeds=4, names=names), timed(rng, names, {"mrt": 0.9, "uniform": 0.8}))
    (sentence,) = (s for s in words.pays(comparisons) if s.startswith("`mrt`"))
    assert sentence.startswith("`mrt`: does not pay here: time (−")
    assert ", and its control `uniform` gives more" in sentence
    (sentence,) = (s for s in words.pays(comparisons) if s.startswith("`uniform`"))
    assert sentence.startswith("`uniform`: gains time (−")


def test_images_of_other_seeds_are_no_sample_of_their_own():
    rng = np.random.default_rng(10)
    shared, apart = (compared(study(rng, shared=s)).tables["accuracy"] for s in (True, False))
    assert {len(y) for y in shared.values()} == {400}
    assert {len(y) for y in apart.values()} == {1200}
    assert all((~np.isnan(y)).nonzero()[0].tolist() == [*range(400 * s, 400 * s + 400)] for (_, s), y in apart.items())


def test_more_seeds_would_tell():
    """The number that is told suffices for the same estimate with the same spread."""
    rng = np.random.default_rng(11)
    row = told(compared(study(rng, images=300), margins=POINT))["decatt", "accuracy"]
    assert row["verdict"] == "undecided"
    comparisons = compared(study(np.random.default_rng(11), images=300), margins=POINT)
    (found,) = (e.estimate for e in comparisons.effects["accuracy"].effects if e.term == (("decatt", "on"),))
    target = max(abs(found.value), found.value + 0.01)
    assert row["more"] == seeds_for(target, found, of=3) - found.seeds >= 1


def test_stopping_needs_every_accuracy_and_more_looks_more_certainty():
    made = study(np.random.default_rng(12), seeds=4, images=4000)
    margins = [{"accuracy": margin} for margin in (0.01, 20.0)]
    assert [verdicts.decided(compared(made), m) for m in margins] == [False, True]
    once, often = (compared(made, looks=looks).verdicts.set_index(["optimization", "response"]) for looks in (1, 8))
    assert "In brackets 99.4 % intervals" in "".join(sections.verdicts(compared(made, looks=8)))
    assert often.loc[("mrt", "accuracy"), "low"] < once.loc[("mrt", "accuracy"), "low"]
    with pytest.raises(InputError, match="write accuracy=0.5"):
        verdicts.decided(compared(made), {"time": 2})
