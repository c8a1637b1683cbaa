"""What a study's folder says of margins, looks and times."""

import json
import shutil

import numpy as np
import pytest
import synthetic

from ablations.analysis import timing, verdicts
from core.errors import InputError


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
