"""Cells that failed, and exact arms that are not what their twins are, in the verdicts."""

from dataclasses import replace

import numpy as np
from judged import POINT, compared, study, told

from ablations.reporting import sections, words


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
