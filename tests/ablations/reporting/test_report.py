"""Reports of planted studies: what they say follows from the cells."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted import NAMES, cell, study, timed
from rich.console import Console

from ablations.analysis.comparisons import compare
from ablations.analysis.responses import BY_NAME, COMPARED
from ablations.reporting import compose as report
from ablations.reporting.formatting import written
from ablations.reporting.terminal import verdict_table
from ablations.reporting.words import pays, sentences
from ablations.study import arms
from ablations.study.store import cell_folder


@pytest.fixture(scope="module")
def lattice(tmp_path_factory):
    """Five seeds of every combination; mrt adds ten points."""
    folder = tmp_path_factory.mktemp("report") / "lattice"
    study(folder, [*NAMES, arms.AGAIN, "recompute"], range(5), lambda arm: 0.9 if "mrt" in arm else 0.8)
    timed(folder, [*NAMES, "recompute"])
    report.write([folder])
    return folder


def said(folder):
    comparisons = compare([folder])
    return "\n".join([*pays(comparisons), *sentences(comparisons)])


def test_the_first_screen_tells_what_was_planted(lattice):
    text = said(lattice)
    assert "17 arms, 5 seeds, 4 epochs on digits, 100 validation images: 90 cells finished, 0 failed" in text
    assert re.search(
        r"^`mrt`: pays where accuracy counts.*: accuracy \(\+(9|10)\.\d\d points\).* for time \(", text, re.M
    )
    assert re.search(
        r"^`crs@0\.3`: pays where memory is short: memory \(−20\.0 %\) for time \(\+(39|40)\.\d %\)", text, re.M
    )
    assert re.search(
        r"^`flash`: pays: time \(−(9|10)\.\d %\) and memory \(−20\.0 %\); accuracy \(0\.00 points\) no worse",
        text,
        re.M,
    )
    assert "Against its control `recompute`: it gains memory (−20.0 %); it costs time (+" in text
    assert re.search(r"Step time: 12 rounds of all arms in shuffled order; the baseline against itself \[[−+]", text)
    assert "**The machine was not quiet**" in text
    assert re.search(r"Repeatability: .*: accuracy [+−]?\d\.\d\d \[", text)
    assert "best" not in text.lower()


def test_the_first_screen_is_the_same_everywhere(lattice):
    """Markdown, the page and the terminal show the verdicts of verdicts.csv."""
    rows = pd.read_csv(lattice / "report" / "verdicts.csv")
    assert list(rows) == ["optimization", "response", "estimate", "low", "high", "margin", "verdict", "seeds"]
    assert set(rows["response"]) == {r + k for r in COMPARED for k in ("", " against control")}
    text, page = ((lattice / "report" / f"report.{kind}").read_text() for kind in ("md", "html"))
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(verdict_table(compare([lattice])))
    printed, screen = console.export_text(), text.split("## ")[1]
    assert screen.startswith("Verdicts")
    for row in rows[~rows["response"].str.contains("control")].to_dict("records"):
        value = written(BY_NAME[row["response"]], row["estimate"])
        assert f"**{row['verdict']}** {value}" in screen
        assert f">{row['verdict']}</strong> {value}" in page
        assert value in printed


def test_every_number_of_the_first_screen_is_in_the_table_of_effects(lattice):
    """Effects in words are those of the table, digit for digit."""
    text = (lattice / "report" / "report.md").read_text()
    found = re.findall(r"([+−]\d+\.\d+ \[[^\]]+\])", text.split("## ")[1])
    own = [value for value in found if value in text.split("## Effects")[1].replace("**", "")]
    assert len(own) >= 7


def test_differences_are_paired_by_seed_and_image(lattice):
    """The table's row by hand, without this project's statistics."""
    text = (lattice / "report" / "report.md").read_text().split("## Arms against the baseline")[1]
    row = re.findall(r"^\| `mrt` \| (.*) \|$", text, re.M)[0].split(" | ")
    d = np.array(
        [
            np.load(cell_folder(lattice, "mrt", s) / "correct.npz")["correct"][-1].astype(float)
            - np.load(cell_folder(lattice, "baseline", s) / "correct.npz")["correct"][-1]
            for s in range(5)
        ]
    )
    assert row[0].replace("**", "").startswith(f"+{100 * d.mean():.2f}")


def test_the_curves_are_the_baseline_each_alone_and_the_best(lattice):
    chosen = compare([lattice]).curves()
    assert chosen[:-1] == ["baseline", "crs@0.3", "decatt", "flash", "mrt", "recompute"]
    means = compare([lattice]).means["accuracy"]
    assert means[chosen[-1]] == means.max()


def test_the_front_is_not_dominated(lattice):
    comparisons = compare([lattice])
    points = {
        a: (comparisons.means.loc[a, "accuracy"], -comparisons.means.loc[a, "step time"])
        for a in comparisons.study.arms
        if a != arms.AGAIN
    }
    front = comparisons.front("accuracy", "step time")
    for arm, point in points.items():
        beaten = any(q != point and q[0] >= point[0] and q[1] >= point[1] for q in points.values())
        assert (arm in front) != beaten


def test_time_to_a_target(lattice, monkeypatch):
    comparisons = compare([lattice])
    first = []
    for c in comparisons.study.arms["mrt"]:
        first += [next((r["seconds"] for r in c.rows if r["val/accuracy"] >= 0.85), np.inf)]
    assert comparisons.to_target("mrt", 0.85) == np.median(first) < np.inf
    assert comparisons.to_target("mrt", 1.1) == np.inf
    assert all(c.result["best_val_accuracy"] >= comparisons.target for c in comparisons.study.arms["baseline"])


def test_effects_are_a_table_for_machines(lattice):
    rows = pd.read_csv(lattice / "report" / "effects.csv")
    assert set(rows["response"]) == {"accuracy", "loss", "step time", "peak memory"}
    assert len(rows) == 4 * 10
    (mrt,) = rows[(rows["response"] == "accuracy") & (rows["effect"] == "mrt")].to_dict("records")
    assert mrt["low_together"] < mrt["low"] < mrt["estimate"] < mrt["high"]
    assert mrt["seeds"] == 5
    assert len(pd.read_csv(lattice / "report" / "results.csv")) == 18 * 5


def test_one_seed_says_so_and_has_no_interval(tmp_path, undrawn):
    folder = study(tmp_path / "one", ["baseline", "flash", "mrt", "flash+mrt"], [0])
    text = said(folder)
    assert "**One seed: accuracy has no interval.** `--seeds 3` gives one." in text
    assert re.search(r"^`mrt`: .*; accuracy: no interval: --seeds 3; time not timed\.", text, re.M)
    assert "[" not in text
    report.write([folder])
    rows = pd.read_csv(folder / "report" / "effects.csv")
    assert rows.loc[rows["response"] == "accuracy", "low"].isna().any()
    assert "step time" not in set(rows["response"])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["flash", "mrt"], "There is no baseline: nothing to compare with"),
        (["baseline"], "There is one arm: nothing to compare"),
        (["baseline", "flash", "mrt"], "do not tell apart the interactions flash × mrt"),
        (
            arms.half(("decatt", "droppath", "muon", "tome")),
            "Aliases, which these arms do not tell from each other: decatt × droppath, muon × tome",
        ),
        (["recompute"], "There is no baseline"),
    ],
)
@pytest.mark.parametrize("seeds", [1, 2])
def test_few_arms(tmp_path, names, expected, seeds):
    folder = study(tmp_path / "few", names, range(seeds))
    report.write([folder])
    assert expected in (folder / "report" / "report.md").read_text()


def test_arms_without_a_seed_of_the_baseline_are_not_compared(tmp_path, undrawn):
    folder = study(tmp_path / "apart", ["baseline"], [0])
    cell(folder, "flash", 1)
    cell(folder, "mrt", 1)
    report.write([folder])
    text = (folder / "report" / "report.md").read_text()
    assert "Not compared, for they share no seed with the baseline: `mrt`." in text
    assert "No arm has a better" not in text


@pytest.mark.parametrize("another", [{"baseline_width": 384}, {"baseline_heads": 6}])
def test_a_baseline_of_another_size_is_left_out_of_the_effects(tmp_path, undrawn, another):
    names = [*arms.PUBLISHED]
    folder = study(tmp_path / "p", names, range(3), lambda arm: 0.3 if arm == "baseline" else 0.8, **another)
    report.write([folder])
    text = (folder / "report" / "report.md").read_text()
    assert "The baseline is another model than the other arms: effects and interactions leave it out" in text
    effects = {e.term: e.estimate.value for e in compare([folder]).effects["accuracy"].effects}
    assert all(abs(value) < 0.1 for value in effects.values())


def test_studies_of_other_seeds_are_joined(tmp_path, undrawn, monkeypatch):
    names = ["baseline", "flash", "mrt", "flash+mrt"]
    a, b = (study(tmp_path / n, names, seeds) for n, seeds in (("a", range(2)), ("b", range(2, 5))))
    whole = study(tmp_path / "whole", names, range(5))
    written = report.write([a, b])
    assert written[0] == tmp_path / "a+b" / "report" / "report.md"
    monkeypatch.chdir(a)
    assert report.write([Path("."), Path("../b")]) == written  # not into a study
    report.write([whole])
    joined, alone = ((f / "report" / "effects.csv").read_text() for f in (tmp_path / "a+b", whole))
    assert joined == alone
    (b / "margins.json").write_text(json.dumps({"margins": {"accuracy": 0.25, "time": 9}, "looks": 4}))
    text = "\n".join(sentences(both := compare([a, b])))
    assert (both.margins, both.looks) == ({"accuracy": 0.25, "time": 2.0, "memory": 2.0}, 4)
    assert "Margins (the strictest of the joined studies): accuracy 0.25 points" in text
    assert "Step times are in each study's own report" in text
    assert "--timing-only" not in text
