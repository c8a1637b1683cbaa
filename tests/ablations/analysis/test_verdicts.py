"""Verdicts of studies in which what each optimization does was planted."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import synthetic

from ablations.analysis import timing, verdicts
from ablations.analysis.comparisons import Comparisons
from ablations.analysis.estimates import seeds_for
from ablations.analysis.factors import levels
from ablations.analysis.timing import Timing
from ablations.reporting import sections, words
from ablations.reporting.formatting import judged
from ablations.study import arms
from ablations.study.arms import twin
from ablations.study.outcomes import Cell
from ablations.study.reading import Study
from core.errors import InputError

NAMES = [arm for arm in arms.lattice() if "crs" not in arm]  # decatt, flash (exact) and mrt
POINT = {"accuracy": 1.0, "time": 2.0, "memory": 2.0}
CONTROLS = ["uniform", "flash+uniform"]


def study(rng, seeds=3, names=NAMES, accuracy=None, peak=None, images=400, shared=False, every=False):
    """accuracy, peak: what an optimization adds to the share of right answers and multiplies the peak by. Exact arms
    have the first seed only, and their twins' answers."""
    cells = {}
    for seed in range(seeds):
        chances = np.random.default_rng(0 if shared else seed).beta(6, 1, images)
        for arm in sorted(names, key=lambda name: (name != "baseline", name.count("+"))):
            if twin(arm) != arm and twin(arm) in names and seed and not every:
                continue
            own = sum((accuracy or {}).get(part, 0.0) for part in levels(arm))
            peaks = np.prod([(peak or {}).get(part, 1.0) for part in levels(arm)])
            result = {"arm": arm, "seed": seed, "peak_bytes": int(1e9 * peaks), "final_val_loss": 1.0 - own}
            result |= {"step_ms_median": 9.0, "epochs": 1} | ({} if shared else {"held_out": seed})
            if twin(arm) != arm and (twin(arm), seed) in cells:
                right = cells[twin(arm), seed].correct[-1]
            else:
                right = rng.random(images) < chances * 0.9 / (6 / 7) + own
            cells[arm, seed] = Cell(result, [], None, right[None])
    configuration = {"data": "digits", "epochs": 1, "preset": "quick"}
    return Study((), configuration, {}, list(cells.values()), [])


def timed(rng, names, ratio=None, rounds=20):
    """A pass with a drift, and a tenth of its blocks disturbed by another process."""
    drift = np.exp(0.1 * np.sin(np.arange(rounds)))
    blocks = [[] for _ in range(rounds)]
    for arm in [*names, arms.AGAIN]:
        mine = np.prod([(ratio or {}).get(part, 1.0) for part in levels(arm)])
        noise = 0.01 * rng.standard_normal(rounds) + (rng.random(rounds) < 0.1) * rng.exponential(0.3, rounds)
        for took, seconds in zip(blocks, mine * drift * np.exp(noise), strict=True):
            took.append((arm, seconds))
    return Timing(blocks, True)


def compared(study, timing=None, **given):
    return Comparisons(study, timing=timing, **given)


def told(comparisons):
    return {(r["optimization"], r["response"]): r for r in comparisons.verdicts.to_dict("records")}


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


def test_failed_cells_count_against_their_optimization():
    made = study(np.random.default_rng(7), seeds=4, names=["baseline", "mrt"], images=20_000)
    bad = [{"arm": "mrt", "seed": s, "error": "FloatingPointError: loss is nan"} for s in (1, 2)]
    failed = replace(made, cells=[c for c in made.cells if c.key not in {("mrt", 1), ("mrt", 2)}], failed=bad)
    margins = {"accuracy": 9.0, "time": 2, "memory": 2}
    assert told(compared(made, margins=margins))["mrt", "accuracy"]["verdict"] == "no worse"
    comparisons = compared(failed, margins=margins)
    row = told(comparisons)["mrt", "accuracy"]
    assert (row["verdict"], row["failed"], row["cells"]) == ("undecided", 2, 4)
    (said,) = words.pays(comparisons)
    assert "accuracy undecided: cells failed that finish without it" in said
    assert "2 of its 4 cells failed" in said
    assert "images" not in said
    table = sections.verdict_table(comparisons)
    assert table.loc[0, "accuracy, points"].startswith("**undecided** (cells failed) ")
    assert comparisons.holes == []


def test_many_failures_are_worse():
    made = study(np.random.default_rng(8), seeds=9, names=["baseline", "mrt"], images=20_000)
    bad = [{"arm": "mrt", "seed": s, "error": "FloatingPointError: loss is nan"} for s in range(2, 9)]
    failed = replace(made, cells=[c for c in made.cells if c.key[0] != "mrt" or c.key[1] < 2], failed=bad)
    found = compared(failed, margins={"accuracy": 50.0, "time": 2, "memory": 2})
    assert told(found)["mrt", "accuracy"]["verdict"] == "worse"
    (said,) = words.pays(found)
    assert said.startswith("`mrt`: does not pay here: costs accuracy (7 of its 9 cells failed); time not timed")


def test_cells_that_fail_without_it_too_are_not_its_own():
    made = study(np.random.default_rng(7), seeds=4, names=["baseline", "mrt"], images=20_000)
    bad = [{"arm": arm, "seed": 1, "error": "OSError"} for arm in ("baseline", "mrt")]
    failed = replace(made, cells=[c for c in made.cells if c.key[1] != 1], failed=bad)
    row = told(compared(failed, margins=POINT | {"accuracy": 9.0}))["mrt", "accuracy"]
    assert (row["verdict"], row["failed"], row["by_failures"]) == ("no worse", 1, False)


def test_an_optimization_that_never_finishes_is_worse():
    made = study(np.random.default_rng(8), seeds=6, names=["baseline", "decatt"])
    bad = [{"arm": "mrt", "seed": s, "error": "FloatingPointError: loss is nan"} for s in range(6)]
    row = told(compared(replace(made, failed=bad)))["mrt", "accuracy"]
    assert (row["verdict"], row["failed"], row["cells"]) == ("worse", 6, 6)


def test_a_twin_stands_for_an_exact_arm():
    """flash is trained at the first seed alone: its accuracy is the baseline's, no cell is missing."""
    made = study(np.random.default_rng(9), seeds=3)
    comparisons = compared(made)
    assert comparisons.holes == []
    assert [cell.key for cell in made.cells if cell.key[0] == "flash"] == [("flash", 0)]
    assert comparisons.means.loc["flash", "accuracy"] == comparisons.means.loc["baseline", "accuracy"]
    every = compared(study(np.random.default_rng(9), seeds=3, every=True))
    assert comparisons.effects["accuracy"].effects == every.effects["accuracy"].effects
    assert all(identity.differ == 0 for identity in comparisons.identities)


def test_an_exact_arm_that_is_not_its_twin_speaks_for_itself():
    """flash alone loses half of the images; in the other arms some go another way, by rounding."""
    made = study(np.random.default_rng(9), seeds=3)
    for arm in ("flash", "decatt+flash"):
        cell = made.arms[arm][0]
        cell.__dict__["correct"] = cell.correct.copy()
    right = made.arms["flash"][0].correct[0]
    right[:200] = False
    made.arms["decatt+flash"][0].correct[0, :10] ^= True
    comparisons = compared(made)
    (broken,) = comparisons.broken
    assert (broken.arm, broken.twin, broken.seed) == ("flash", "baseline", 0)
    assert comparisons.means.loc["flash", "accuracy"] == right.mean()
    row = told(comparisons)["flash", "accuracy"]
    assert row["verdict"] == "undecided"
    assert row["estimate"] < -3
    text = "\n".join([*words.pays(comparisons), *words.sentences(comparisons)])
    lead = 100 * (right.mean() - made.arms["baseline"][0].correct[0].mean())
    assert f"**`flash` breaks its contract (exact):** at seed 0 its accuracy is −{-lead:.2f} points from that" in text
    assert "identical for 2 of 4 such arms" in text
    assert "Not there, and fitted without: `flash` seed 1, `flash` seed 2." in text


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


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"speed": 1}, "margin of 'speed'"), ({"accuracy": 0}, "accuracy=0 is no positive number"),
        ({"time": "x"}, "time=x is no positive number"), ({"memory": float("inf")}, "no positive number"),
        ({"accuracy": -1}, "write for example accuracy=0.5"),
    ],
)  # fmt: skip
def test_bad_margins_are_refused(given, expected):
    with pytest.raises(InputError, match=expected):
        verdicts.read_margins(given)


def test_margins_and_looks_are_the_studys_own(tmp_path):
    assert verdicts.read_decisions(tmp_path) == (verdicts.MARGINS, 1)
    (tmp_path / "margins.json").write_text(json.dumps({"margins": {"accuracy": 1}, "looks": 7}))
    assert verdicts.read_decisions(tmp_path) == (verdicts.MARGINS | {"accuracy": 1.0}, 7)
    (tmp_path / "margins.json").write_text("[]")
    with pytest.raises(InputError, match="cannot be read"):
        verdicts.read_decisions(tmp_path)


def test_a_timing_pass_is_read_round_by_round(tmp_path):
    made = {"baseline": "baseline", "rounds": 2, "quiet": True, "ratios": {}}
    blocks = [[["flash", 0.5], ["baseline", 1.0]], [["baseline", 2.0]]]
    shutil.copy(synthetic.study(tmp_path / "study", []) / "study.json", tmp_path)
    (tmp_path / "timing.json").write_text(json.dumps(made | {"blocks": blocks}))
    table = timing.read([tmp_path]).table
    assert set(table) == {("baseline", 0), ("baseline", 1), ("flash", 0)}
    assert table["flash", 0] - table["baseline", 0] == pytest.approx(np.log(0.5))
    assert timing.read([tmp_path, tmp_path]) is None
    (tmp_path / "timing.json").write_text(json.dumps(made))
    with pytest.raises(InputError, match="timing.json. cannot be read .blocks: Field required"):
        timing.read([tmp_path])
