import json
import re
from dataclasses import asdict
from itertools import product

import pytest
import synthetic

from ablations.study import hours, running, schema, store
from ablations.study.recipes import Recipe
from core.errors import InputError


def study(**values):
    recipe = Recipe(
        device="cpu", engine="eager", width=16, depth=1, heads=2, mlp=32, batch_size=100, epochs=3, **values
    )
    return running.foresee("baseline,decatt,flash", recipe, "data", present=False)


def test_hours_are_steps_and_evaluations():
    """1,437 images in batches of 100: 14 steps; 360 to validate cost as much as 1.2 steps."""
    found = study()
    left = hours.cells(found.planned((0, 1)), {"baseline": 1.0, "decatt": 2.0, "flash": 3.0})
    train, val = len(found.data.train.labels), len(found.data.val.labels)
    seconds = 3 * (train // 100 + val / 300)
    assert {(cell.arm, cell.seed): cell.hours for cell in left} == pytest.approx(
        {
            ("baseline", 0): seconds / 3600, ("decatt", 0): 2 * seconds / 3600, ("flash", 0): 3 * seconds / 3600,
            ("baseline", 1): seconds / 3600, ("decatt", 1): 2 * seconds / 3600,
        }
    )  # fmt: skip


def test_wall_time_is_within_a_third_of_the_least():
    lengths = [7.0, 5.0, 4.0, 4.0, 3.0, 3.0, 2.0]
    for workers in (1, 2, 3):
        least = min(
            max(sum(x for x, w in zip(lengths, where, strict=True) if w == i) for i in range(workers))
            for where in product(range(workers), repeat=len(lengths))
        )
        assert least <= hours.wall(lengths, workers) <= (4 / 3 - 1 / (3 * workers)) * least
    assert hours.wall(lengths, 7) == hours.wall(lengths, 100) == 7


def test_a_summary_counts_devices():
    left = [hours.Planned("a", seed, 2.0) for seed in range(3)]
    assert hours.summary(left, 4) == {
        "cells": 3,
        "device_hours": 24.0,
        "longest_cell_hours": 2.0,
        "wall_hours": {4: 6.0, 8: 4.0, 12: 2.0},
    }
    assert hours.summary([], 1)["wall_hours"] == {1: 0.0}


def test_step_times_are_the_timing_passes_or_measured(tmp_path):
    measured, source = hours.step_seconds(study(), tmp_path)
    assert measured.keys() == {"baseline", "decatt", "flash"}
    assert all(0 < seconds < 60 for seconds in measured.values())
    assert "measured now" in source
    rounds = [{"baseline": 1, "decatt": 3, "flash": 1}, {"baseline": 2, "flash": 1}, {"baseline": 9, "decatt": 5}]
    found = {"rounds": 3, "quiet": True, "ratios": {}, "blocks": [list(took.items()) for took in rounds]}
    together = study(parallel="fsdp", processes=4)
    settings = {"preset": "quick"} | json.loads(json.dumps(asdict(together.recipe)))
    machine = {"torch": "2", "device_name": "a processor", "threads": "1"}
    store.write_json(tmp_path / "study.json", {"configuration": settings, "environment": machine})
    for damaged in ("{", json.dumps(found | {"settings": "0" * 64})):
        (tmp_path / "timing.json").write_text(damaged)
        assert "measured now: '" in hours.step_seconds(study(), tmp_path)[1]
        with pytest.raises(InputError, match="step times of 4 processes are not known: .*--timing-only"):
            hours.step_seconds(together, tmp_path)
    own = schema.settings(store.read_study(tmp_path))
    (tmp_path / "timing.json").write_text(json.dumps(found | {"settings": own}))
    assert hours.step_seconds(together, tmp_path)[0] == {"baseline": 2.0, "decatt": 4.0, "flash": 1.0}


def test_hours_beside_another_study_are_refused(command, refused):
    synthetic.study(command.out, ["baseline"])
    told = refused("--arms", "baseline", "--plan", "--hours")
    assert re.search(r"holds a study with other settings \(.*epochs 4 -> 2", told)


def test_failed_cells_are_no_hours_unless_they_are_trained_again(command, capsys):
    folder = store.cell_folder(command.out, "baseline", 0)
    folder.mkdir(parents=True)
    store.write_json(folder / "failed.json", {"arm": "baseline", "seed": 0, "error": "no"})
    for more, cells in ((), 0), (("--retry-failed",), 1):
        capsys.readouterr()
        assert command("--arms", "baseline", "--plan", "--hours", "--json", *more) == 0
        assert json.loads(capsys.readouterr().out)["cells"] == cells
