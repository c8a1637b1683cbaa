"""Where a report is written: what an earlier one wrote is replaced, and nothing else."""

import json
import os
from itertools import count
from pathlib import Path
from threading import Thread

import pytest
from planted import study

from ablations.analysis.comparisons import compare
from ablations.reporting import compose as report
from core.errors import InputError


def test_a_report_replaces_what_it_wrote_and_nothing_else(tmp_path):
    folder, out = study(tmp_path / "s", ["baseline", "mrt"], range(2)), tmp_path / "paper"
    mine = [
        out / "thesis.tex",
        out / ".writing-notes" / "1.txt",
        out / "figures" / "mine.png",
        out / "tensorboard" / "mrt" / "events.out.tfevents.mine",
    ]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    (out / "figures" / "effects.png").write_text("mine")
    with pytest.raises(InputError, match="figures/effects.png. is not of a report; move it, or pass another --out"):
        report.write([folder], out)
    assert sorted(path for path in out.rglob("*") if path.is_file()) == sorted([*mine, out / "figures/effects.png"])
    killed = out / ".writing-0" / ".unfinished"
    killed.parent.mkdir()
    killed.touch()
    (torn := out / "..written.json.0.partial").touch()
    (out / "figures" / "effects.png").rename(tmp_path / "moved.png")
    report.write([folder], out)
    assert (out / "figures" / "effects.png").exists()
    report.write([study(tmp_path / "alone", ["baseline"], range(2))], out)
    assert not (out / "figures" / "effects.png").exists()
    assert len(list((out / "tensorboard").glob("*/events*"))) == 3  # the report's, the baseline's and mine
    assert all(path.read_text() == "mine" for path in mine)
    assert not killed.parent.exists()
    assert not torn.exists()
    assert not (folder / "report").exists()


@pytest.mark.parametrize("after", range(0, 14, 2))
def test_whatever_ends_a_report_the_next_one_clears_up(tmp_path, monkeypatch, undrawn, after):
    folder, calls = study(tmp_path / "s", ["baseline"], [0]), count()

    def ending(do):
        def done(path, *how, **ways):
            if ".writing-" in str(path) and next(calls) >= after:
                raise KeyboardInterrupt
            do(path, *how, **ways)

        return done

    with monkeypatch.context() as patched:
        for owner, name in ((Path, "unlink"), (Path, "rmdir"), (os, "replace")):
            patched.setattr(owner, name, ending(getattr(owner, name)))
        with pytest.raises(KeyboardInterrupt):
            report.write([folder])
    (left,) = (folder / "report").glob(".writing-*")
    assert (left / ".unfinished").is_file() or not [*left.iterdir()]
    report.write([folder])
    assert not [*(folder / "report").glob(".writing-*")]


@pytest.mark.parametrize("name", ["figures", "tensorboard", "report.md/"])
def test_what_is_in_the_way_is_refused_before_anything_is_moved(tmp_path, monkeypatch, name):
    def draw(comparisons, figures):
        figures.mkdir()
        (figures / "pareto.png").touch()
        return {}

    monkeypatch.setattr(report.figures, "draw", draw)
    folder, path = study(tmp_path / "s", ["baseline"], [0]), tmp_path / "out" / name
    path.parent.mkdir()
    path.mkdir() if name.endswith("/") else path.touch()
    for own in (False, True):
        with pytest.raises(InputError, match=f"out/{name.strip('/')}' is not of a report; move it"):
            report.write_comparisons(compare([folder]), tmp_path / "out", own=own)
    assert [*(tmp_path / "out").iterdir()] == [path]


@pytest.mark.parametrize("below", ["cells", "cells/paper"])
def test_cells_are_no_place_for_a_report(tmp_path, below):
    folder = study(tmp_path / "s", ["baseline"], [0])
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match=rf"s/{below}' is among the cells of the study '.*/s'; pass another --out"):
        report.write([folder], folder / below)
    assert sorted(folder.rglob("*")) == before


def test_a_folder_whose_name_begins_like_a_home(tmp_path, undrawn, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report.write([study(Path("~/study"), ["baseline"], [0])])
    assert (tmp_path / "~/study/report/results.csv").is_file()


def test_two_reports_at_once_wait_for_each_other(tmp_path, undrawn):
    folder, over = study(tmp_path / "s", ["baseline"], [0]), []
    writer = Thread(target=lambda: over.append(report.write([folder])))
    with report.alone(folder / "report"), report.alone(folder / "report", wait=False) as other:
        assert not other
        writer.start()
        writer.join(0.3)
        assert not over
    writer.join()
    assert over


def test_a_listing_that_points_elsewhere_removes_nothing(tmp_path, undrawn):
    folder, precious = study(tmp_path / "s", ["baseline"], [0]), tmp_path / "precious"
    precious.write_text("")
    (folder / "report").mkdir()
    (folder / "report" / ".written.json").write_text(json.dumps(["../../precious", str(precious)]))
    report.write([folder])
    assert precious.exists()


def test_a_listing_that_is_no_file_is_not_waited_for(tmp_path, undrawn):
    folder = study(tmp_path / "s", ["baseline"], [0])
    (folder / "report").mkdir()
    os.mkfifo(folder / "report" / ".written.json")
    with pytest.raises(InputError, match="written.json' is a device or a pipe"):
        report.write([folder])
