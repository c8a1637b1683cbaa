"""Cells that failed, are missing or damaged, in a report; and what it refuses."""

import builtins
import json
import re
import shutil

import pytest
from commands import call
from planted import cell, study, timed

from ablations import report as command
from ablations.reporting import compose as report
from ablations.reporting import plotting
from ablations.study import reading
from ablations.study.store import cell_folder
from core.errors import InputError

pytestmark = pytest.mark.usefixtures("undrawn")


def test_missing_and_failed_cells_are_named(tmp_path):
    folder = study(tmp_path / "holes", ["baseline", "flash", "mrt", "flash+mrt"], range(3))
    shutil.rmtree(cell_folder(folder, "mrt", 1))
    cell_folder(folder, "mrt", 1).mkdir()
    (cell_folder(folder, "mrt", 1) / "failed.json").write_text(
        json.dumps({"arm": "mrt", "seed": 1, "error": "FloatingPointError: loss is nan"})
    )
    report.write([folder])
    text = (folder / "report" / "report.md").read_text()
    assert "Not there" not in text
    assert "1 of its 6 cells failed" in text
    assert "11 cells finished, 1 failed" in text
    assert "mrt, seed 1: `FloatingPointError: loss is nan`" in text
    shutil.rmtree(cell_folder(folder, "mrt", 1))
    report.write([folder])
    assert "Not there, and fitted without: `mrt` seed 1" in (folder / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("timing.json", "{"),
        ("margins.json", '{"margins": {"accuracy": "a"}}'),
        ("cells/mrt/seed0/result.json", "{"),
        ("cells/mrt/seed0/result.json", "{}"),
        ("cells/mrt/seed0/correct.npz", ""),
        ("cells/mrt/seed0/correct.npz", "x"),
        ("cells/mrt/seed0/metrics.jsonl", "{}"),
        ("cells/mrt/seed0/metrics.jsonl", None),
    ],
)
def test_a_damaged_file_is_named_and_left_out(tmp_path, name, content):
    folder = study(tmp_path / "damaged", ["baseline", "mrt"], range(2))
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    report.write([folder])
    text = (folder / "report" / "report.md").read_text()
    assert re.search(rf"\*\*Left out:\*\* `+ ?'{re.escape(str(folder / name))}' (cannot be read|is not there)", text)
    assert f"{3 if name.startswith('cells') else 4} cells finished" in text


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"configuration": {"preset": "quick"}, "environment": {}}'])
def test_a_damaged_study_is_one_message(tmp_path, content):
    folder = study(tmp_path / "damaged", ["baseline", "mrt"], range(2))
    (folder / "study.json").write_text(content)
    with pytest.raises(InputError, match=r"study.json' cannot be read \(.*\); restore it, or train again: python"):
        report.write([folder])
    assert not (folder / "report" / "report.md").exists()


@pytest.mark.parametrize(
    ("configuration", "expected"),
    [
        ({"preset": "matched"}, "preset 'quick' and 'matched'"),
        ({"data": "cifar10"}, "data 'digits' and 'cifar10'"),
        ({"learning_rate": 1.0, "mlp": 7}, "mlp 128 and 7, learning_rate 0.005 and 1.0"),
        (
            {},
            "two of the studies have 'baseline' at seed 0, '{a}' and '{b}'; pass each once, and train other",
        ),
    ],
)
def test_studies_that_differ_are_not_joined(tmp_path, configuration, expected):
    a, b = (study(tmp_path / n, ["baseline"], [0], **given) for n, given in (("a", {}), ("b", configuration)))
    with pytest.raises(InputError, match=re.escape(expected.format(a=a, b=b))):
        report.write([a, b])
    assert not (tmp_path / "a+b").exists()


def test_parameters_of_optimizations_count_in_any_order_where_studies_are_joined(tmp_path):
    given = [["decatt.weight=1", "mrt.scorer=blur"], ["mrt.scorer=blur", "decatt.weight=1.0"], ["mrt.scorer=entropy"]]
    a, b, c = (study(tmp_path / name, ["baseline"], [i], set=given[i]) for i, name in enumerate("abc"))
    assert len(reading.read([a, b]).cells) == 2
    with pytest.raises(InputError, match="set .*'mrt.scorer=entropy'"):
        reading.read([a, c])


def test_of_studies_to_join_one_at_least_has_a_cell(tmp_path):
    a, b = (study(tmp_path / name, [], []) for name in "ab")
    same = {"code": "c", "data": "d", "weights": None}
    (b / "study.json").write_text(json.dumps(json.loads((b / "study.json").read_text()) | {"identity": same}))
    with pytest.raises(InputError, match=r"'.*/a' and '.*/b': no finished cell yet; run ablations/run.py --out "):
        reading.read([a, b])
    cell(a, "baseline", 0, identity=same | {"data": "e"})
    with pytest.raises(InputError, match="digest of data 'e' and 'd'"):
        reading.read([a, b])


def test_what_others_wrote_is_shown_as_it_is(tmp_path):
    """Errors are no Markdown, and an arm that was not timed has its reason."""
    folder = study(tmp_path / "study", ["baseline", "flash", "mrt"], [0])
    timed(folder, ["baseline", "mrt"])
    timing, error = json.loads((folder / "timing.json").read_text()), "E: ![x](http://a/b.png)\n# <script>`**x**"
    (folder / "timing.json").write_text(json.dumps(timing | {"failed": {"flash": error}}))
    at = cell_folder(folder, "mrt", 1)
    at.mkdir()
    (at / "failed.json").write_text(json.dumps({"arm": "mrt", "seed": 1, "error": error}))
    report.write([folder])
    text = (folder / "report" / "report.md").read_text()
    assert "* mrt, seed 1: `` E: ![x](http://a/b.png) # <script>`**x** ``\n" in text
    assert "Arms that were not timed: `flash` (`` E: ![x](http://a/b.png) # <script>`**x** ``)." in text
    page = (folder / "report" / "report.html").read_text()
    assert page.count("<code>E: ![x](http://a/b.png) # &lt;script&gt;`**x**</code>") == 2


@pytest.mark.parametrize("name", ["report", "report/tensorboard", "report/.written.json"])
def test_nothing_is_written_where_a_link_leads(tmp_path, name):
    """Or over a folder in the listing's place."""
    folder, theirs = study(tmp_path / "study", ["baseline"], [0]), tmp_path / "theirs"
    report.write([folder])
    (theirs).mkdir()
    (theirs / "report.md").write_text("mine")
    shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    (folder / name).symlink_to(theirs) if "written" not in name else (folder / name).mkdir()
    with pytest.raises(InputError, match=r"/report/\S+' is not of a report; move it, or pass another --out"):
        report.write([folder])
    assert [path.name for path in theirs.iterdir()] == ["report.md"]
    assert (theirs / "report.md").read_text() == "mine"


def test_studies_of_other_machines_are_not_joined(tmp_path):
    a, b = study(tmp_path / "a", ["baseline"], [0]), study(tmp_path / "b", ["baseline"], [1])
    kept = json.loads((b / "study.json").read_text())
    kept["environment"]["device_name"] = "another"
    (b / "study.json").write_text(json.dumps(kept))
    with pytest.raises(InputError, match="device_name 'a processor' and 'another'"):
        report.write([a, b])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{tmp}/none"], "holds no study"),
        (["{tmp}/empty"], "no finished cell yet"),
        (["{tmp}/old"], "correct.npz' is not there"),
        (["{tmp}/good", "--target", "120"], "target 120.0 is outside 0 to 100 %"),
        (["{tmp}/good", "--target", "100.0001"], "target 100.0001 is outside 0 to 100 %"),
        ([], "no study given"),
    ],
)
def test_bad_input_is_one_message(tmp_path, capsys, arguments, expected):
    study(tmp_path / "empty", [], [])
    study(tmp_path / "good", ["baseline"], [0])
    (cell_folder(study(tmp_path / "old", ["baseline"], [0]), "baseline", 0) / "correct.npz").unlink()
    assert call(command.main, *(a.format(tmp=tmp_path) for a in arguments)) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert len(error.splitlines()) == 1


def test_a_backend_that_matplotlib_does_not_know_is_one_message(monkeypatch):
    imported = builtins.__import__

    def failing(name, *rest):
        if name == "matplotlib":
            raise ValueError("Key backend: 'x' is not a valid value")
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", failing)
    with pytest.raises(InputError, match=r"cannot be loaded \(ValueError: Key backend.*\); mend or unset MPLBACKEND"):
        plotting.pyplot()
