import json
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import synthetic
import torch

from ablations.study import claims, reading, running, schema, timing
from ablations.study.presets import PRESETS
from ablations.study.recipes import replace
from ablations.study.store import read_study, write_json
from core.errors import InputError

TINY = replace(
    PRESETS["quick"], device="cpu", engine="eager", image=8, width=16, depth=1, heads=2, mlp=32, batch_size=128
)


SAME = {"code": "c", "data": "d", "weights": None}


@pytest.fixture
def out(tmp_path):
    folder = synthetic.study(tmp_path / "study", [], timed=False)
    write_json(folder / "study.json", read_study(folder) | {"identity": SAME})
    return folder


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(timing, "BLOCK", 0.002)
    monkeypatch.setattr(timing, "ROUNDS", 3)
    monkeypatch.setattr(timing.measure, "ceiling", lambda dtype, device: 1e12)


def study(arms):
    return running.prepare(arms, TINY, Path("data"))


def measured(cells, out):
    said = []
    made_by = {"identity": SAME, "settings": schema.settings(read_study(out))}
    timing.measure_arms(cells, made_by, out, SimpleNamespace(note=said.append))
    return json.loads((out / "timing.json").read_text()), said


def test_every_arm_and_the_baseline_twice(out, short):
    found, said = measured(study("baseline,flash,mrt").cells, out)
    arms = {"baseline", "baseline-again", "flash", "mrt"}
    assert found["ratios"].keys() == arms
    assert all(sorted(arm for arm, _ in took) == sorted(arms) for took in found["blocks"])
    assert len(found["blocks"]) == found["rounds"] == 3
    assert found["ratios"]["baseline"] == {"ratio": 1, "low": 1, "high": 1}
    assert all(r["low"] <= r["ratio"] <= r["high"] for r in found["ratios"].values())
    assert found["ceiling"] == 1e12
    assert found["identity"] == SAME
    assert "4 arms, 3 rounds" in said[-1]


def test_the_baseline_has_more_blocks_among_many_arms(out, short, monkeypatch):
    planted(monkeypatch, {})
    found, _ = measured(study("lattice:flash,crs,decatt,mrt").cells, out)
    for took in found["blocks"]:
        counts = Counter(arm for arm, _ in took)
        assert counts.pop("baseline") == counts.pop("baseline-again") == 5  # the root of 23
        assert set(counts.values()) == {1}


def test_a_pass_is_not_done_again_for_arms_that_it_has(out, short):
    cells = study("baseline,flash").cells
    assert not timing.complete(out, cells)
    measured(cells, out)
    assert timing.complete(out, cells[1:])
    assert not timing.complete(out, study("baseline,mrt").cells)
    write_json(out / "timing.json", reading.timing(out) | {"settings": "0" * 64})
    assert not timing.complete(out, cells[1:])
    with pytest.raises(InputError, match=r"timing.json. was measured under other settings than study.json has"):
        reading.timing(out)


def test_without_a_baseline_there_is_nothing_to_compare_with(out):
    with pytest.raises(InputError, match="add it: --arms baseline"):
        measured(study("flash").cells, out)
    assert not (out / "timing.json").exists()


def planted(monkeypatch, factors, noise=lambda i: 1.0):
    """Blocks that take 1 ms for the baseline and a factor of it for others, on a clock that only they move."""
    clock, calls = [0.0], [0]

    def block(cell, states):
        def run():
            calls[0] += 1
            clock[0] += 0.01 * factors.get(cell.arm.name, 1.0) * noise(calls[0])

        return run, 10

    monkeypatch.setattr(timing, "_block", block)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])


def test_a_planted_factor_is_found_whatever_disturbs_some_rounds(out, short, monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 20)
    jumps = torch.rand(1000, generator=torch.Generator().manual_seed(0)).tolist()
    planted(monkeypatch, {"flash": 1.1, "mrt": 0.8}, lambda i: 3.0 if i % 23 == 0 else 1 + 0.004 * jumps[i])
    found, _ = measured(study("baseline,flash,mrt").cells, out)
    for arm, factor in {"flash": 1.1, "mrt": 0.8, "baseline-again": 1.0}.items():
        r = found["ratios"][arm]
        assert r["low"] <= factor <= r["high"]
        assert r["high"] - r["low"] < 0.01
    assert found["quiet"]
    assert found["rounds"] == 20  # quiet at once: no more than the least
    assert dict(found["blocks"][0])["flash"] == pytest.approx(0.0011, rel=0.01)


def test_a_machine_that_is_never_quiet_is_told_of_and_ends(out, short, monkeypatch):
    jumps = torch.rand(10_000, generator=torch.Generator().manual_seed(0)).tolist()
    planted(monkeypatch, {}, lambda i: 1 + jumps[i])
    cells = study("baseline,flash").cells
    for cap, rounds in ((0.0, 3), (3.0, 60)):
        monkeypatch.setattr(timing, "_most", lambda out, cap=cap: cap)
        found, said = measured(cells, out)
        assert not found["quiet"]
        assert found["rounds"] == pytest.approx(rounds, rel=0.2)
        assert "the machine was not quiet" in said[-1]


def test_arms_that_do_not_fit_together_are_measured_in_groups(out, short, monkeypatch):
    block, there = timing._block, []

    def crowded(cell, states):
        if not states:
            there.clear()
        if len(there) == 3 or cell.arm.name == "decatt":
            raise torch.cuda.OutOfMemoryError
        there.append(cell.arm.name)
        return block(cell, states)

    monkeypatch.setattr(timing, "_block", crowded)
    found, said = measured(study("baseline,flash,decatt,mrt").cells, out)
    assert found["groups"] == 2
    assert found["rounds"] == 6
    assert "decatt does not fit beside the baseline" in said[0]
    assert "decatt" in found["failed"]
    assert [{arm for arm, _ in took} - {"baseline", "baseline-again"} for took in found["blocks"]] == [
        *[{"flash"}] * 3,
        *[{"mrt"}] * 3,
    ]
    assert all("baseline" in dict(took) for took in found["blocks"])
    assert found["ratios"].keys() == {"baseline", "baseline-again", "flash", "mrt"}


def test_an_arm_that_fails_is_told_of(out, short, monkeypatch):
    block = timing._block

    def failing(cell, states):
        if cell.arm.name == "mrt":
            raise RuntimeError("no kernel")
        return block(cell, states)

    monkeypatch.setattr(timing, "_block", failing)
    cells = study("baseline,flash,mrt").cells
    found, said = measured(cells, out)
    assert said[0] == "timing pass: mrt failed: RuntimeError: no kernel"
    assert "mrt" not in found["ratios"]
    assert found["failed"] == {"mrt": "failed: RuntimeError: no kernel"}
    assert timing.complete(out, cells), "the others' times stay, until --retry-failed"
    timing.forget_failures(out)
    assert not timing.complete(out, cells)


def test_a_block_is_long_enough(out):
    run, steps = timing._block(study("baseline").cells[0], {})
    begin = time.perf_counter()
    run()
    assert steps >= timing.STEPS
    assert time.perf_counter() - begin > timing.BLOCK / 3  # a third: the machine may be busier when it is chosen


def test_the_ceiling_is_measured_once_a_study(out, monkeypatch):
    (cell,) = study("baseline").cells
    claimed = []
    monkeypatch.setattr(timing.measure, "ceiling", lambda *_: claimed.append(claims.taken(out / "study")) or 1e12)
    assert timing.ceiling(out, cell) == timing.ceiling(out, cell) == 1e12
    assert claimed == [True]
    assert read_study(out)["ceiling"] == {"float32": 1e12}
    assert read_study(out)["identity"] == SAME


def test_a_baseline_that_fails_is_told_of_and_no_pass_is_kept(out, short, monkeypatch):
    def failing(cell, states):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(timing, "_block", failing)
    cells, said = study("baseline,flash").cells, []
    assert timing.measure_arms(cells, {}, out, SimpleNamespace(note=said.append)) == 1
    assert said == ["timing pass: baseline failed: RuntimeError: no kernel"]
    assert not (out / "timing.json").exists()
