"""Profiles as text and images: from profiles made by hand."""

import json
from dataclasses import asdict

import pytest

from ablations.reporting import profiles
from ablations.study.profiling import Operation, Profile
from core.errors import InputError

MANY = [Operation(f"aten::op{i}", "elementwise", 1, 0.5 / (i + 1), 0) for i in range(40)]
PROFILES = {
    "baseline": [Operation("aten::mm", "matrix product", 5, 4.0, 1.5), *MANY],
    "few": [Operation("aten::mm", "matrix product", 2, 1.5, 0.5)],
    "listed": [Operation("aten::_foreach_lerp_", "optimizer", 1, 0.5, 0.0)],
}


@pytest.fixture
def folders(tmp_path):
    out = {}
    for arm, operations in PROFILES.items():
        made = Profile(arm, "cpu", 3, 7.0, 8.0, operations, [0.0, 1.0, 2.0], [2**20, 3 * 2**20, 2**20])
        out[arm] = tmp_path / "cells" / arm / "profile"
        out[arm].mkdir(parents=True)
        text = asdict(made) | {"operations": [o._asdict() for o in operations]}
        (out[arm] / "profile.json").write_text(json.dumps(text))
    return out


def rows(text, title):
    """The rows below a table's header by their first cell."""
    body = text[text.index(f"| {title} |") :].split("\n\n")[0].splitlines()[2:]
    cells = ([cell.strip(" `") for cell in line.strip("|").split(" | ")] for line in body)
    return {first: rest for first, *rest in cells}


def test_shares_sum_to_all(folders, tmp_path):
    for pages in profiles.write(folders, tmp_path / "report").values():
        table = rows(pages.texts["operations"], "operation")
        assert sum(float(cells[3]) for cells in table.values()) == pytest.approx(100, abs=0.005 * len(table))


def test_texts_and_images_lie_in_a_folder_an_arm(folders, tmp_path):
    pages = profiles.write(folders, tmp_path / "report")
    assert set(pages) == set(PROFILES)
    for arm, told in pages.items():
        text = (tmp_path / "report" / arm / "operations.md").read_text()
        assert all(part in text for part in told.texts.values())
        assert "for proportions only" in text
        assert set(told.images) == {"categories", "memory"}
        assert all(path.stat().st_size > 0 for path in told.images.values())
        assert [p.name for p in folders[arm].iterdir()] == ["profile.json"]  # nothing is written beside the cells


def test_difference_from_the_baseline(folders, tmp_path):
    pages = profiles.write(folders, tmp_path / "report")
    cells = rows(pages["few"].texts["difference"], "operation")
    assert cells["aten::mm"] == ["1.500", "4.000", "-2.500", "2.0", "5.0", "changed"]
    kinds = rows(pages["listed"].texts["difference"], "category")
    assert (kinds["optimizer"][-1], kinds["matrix product"][-1]) == ("new", "gone")
    assert "is what other arms are compared with" in pages["baseline"].texts["difference"]


def test_without_a_baseline_there_is_no_difference_and_it_is_said(folders, tmp_path):
    text = profiles.write({"few": folders["few"]}, tmp_path)["few"].texts["difference"]
    assert "No profile of `baseline`: no difference from it." in text
    assert "ms there" not in text


def test_a_folder_without_a_profile_is_refused(tmp_path):
    with pytest.raises(InputError, match="profile.json' is not there"):
        profiles.write({"a": tmp_path}, tmp_path)
