"""What a study's files must hold."""

import errno
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from synthetic import study

from ablations.study import outcomes, reading, schema, store

GOOD = {"margins": {"accuracy": 0.5}, "looks": 2}


def parsed(value):
    return schema.parse(json.dumps(value).encode(), schema.MarginsFile, "a.json")


def test_a_seal_is_of_the_content():
    sealed = schema.sealed(GOOD)
    assert parsed(sealed) == parsed(GOOD) == GOOD
    with pytest.raises(schema.Damaged, match=r"'a.json' cannot be read \(it is not as it was written"):
        parsed(sealed | {"looks": 3})
    assert schema.sealed(sealed) == sealed


def test_every_bit_of_a_sealed_file_counts():
    content = json.dumps(schema.sealed(GOOD)).encode()
    told = []
    for at in range(8 * len(content)):
        broken = bytearray(content)
        broken[at // 8] ^= 1 << at % 8
        try:
            told.append(schema.parse(bytes(broken), schema.MarginsFile, "a.json"))
        except schema.Damaged:
            continue
    assert all({k: v for k, v in of.items() if k in GOOD} == GOOD for of in told)  # the seal's own name was hit


@pytest.mark.parametrize("often", [1, 2])
def test_a_file_that_another_machine_replaces_while_it_is_read_is_read_again(tmp_path, monkeypatch, often):
    (path := tmp_path / "a.json").write_text("{}")
    read, stale = Path.read_bytes, [OSError(errno.ESTALE, "Stale file handle")] * often

    def replaced(path):
        if stale:
            raise stale.pop()
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", replaced)
    with nullcontext() if often == 1 else pytest.raises(schema.Unread, match="a.json' cannot be read"):
        assert schema.content(path) == b"{}"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"best_val_accuracy": float("nan")}, "best_val_accuracy"),
        ({"train_seconds": float("inf")}, "train_seconds"),
        ({"step_ms_median": 0.0}, "step_ms_median"),
        ({"parameters": "1000"}, "parameters"),
        ({"kept_by_op": {"mm": -1}}, "kept_by_op.mm"),
        ({"gpu": {"clocks": [1.0, float("nan")]}}, "gpu is not finite"),
        ({"arm": "../up"}, "arm"),
        ({"seed": 7}, "is of another cell"),
        ({"epochs": 3}, "2 of 3 epochs"),
    ],
)
def test_a_result_is_finite_and_of_its_cell(tmp_path, change, what):
    folder = store.cell_folder(study(tmp_path / "s", ["mrt"], seeds=1, epochs=2), "mrt", 0)
    assert outcomes.finished(folder)
    result = json.loads((folder / "result.json").read_text())
    store.write_result(folder, result | change)
    assert what in outcomes.damage(folder)
    assert not outcomes.finished(folder)
    store.write_result(folder, {k: v for k, v in result.items() if k not in change})
    assert not outcomes.finished(folder) or "gpu" in change


def test_a_file_that_goes_while_it_is_looked_at_is_damage(tmp_path, monkeypatch):
    """Another process begins a damaged cell again."""
    folder = store.cell_folder(study(tmp_path / "s", ["mrt"], seeds=1, epochs=2), "mrt", 0)
    stat = Path.stat

    def seen(path, **options):
        found = stat(path, **options)
        (folder / "result.json").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "stat", seen)
    assert "result.json' is not there" in outcomes.damage(folder)


def test_digests_are_of_both_files_and_of_no_others(tmp_path):
    folder = store.cell_folder(study(tmp_path / "s", ["mrt"], seeds=1, epochs=2), "mrt", 0)
    result = json.loads((folder / "result.json").read_text())
    other = {"../../../study.json": schema.digest((tmp_path / "s" / "study.json").read_bytes())}
    for files in (other, result["files"] | other, {"correct.npz": result["files"]["correct.npz"]}):
        store.write_json(folder / "result.json", result | {"files": files})
        assert "not metrics.jsonl and correct.npz" in outcomes.damage(folder)


def test_seconds_grow(tmp_path):
    folder = store.cell_folder(study(tmp_path / "s", ["mrt"], seeds=1, epochs=2), "mrt", 0)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows[0]["seconds"] = 9.0
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    store.write_result(folder, json.loads((folder / "result.json").read_text()))
    assert "has seconds that do not grow" in outcomes.damage(folder)


@pytest.mark.parametrize("arm", ["decatt+decatt", "mrt+uniform", "mrt+flash"])
def test_a_failure_of_no_arm_is_named_with_its_file(tmp_path, arm):
    folder = study(tmp_path / "s", ["mrt"], seeds=1, epochs=2)
    at = store.cell_folder(folder, arm, 0)
    at.mkdir(parents=True)
    store.write_json(at / "failed.json", {"arm": arm, "seed": 0, "error": "x"})
    (told,) = reading.read([folder]).damaged
    assert told.startswith(f"'{at / 'failed.json'}' is of no arm: ")


@pytest.mark.parametrize(
    ("table", "what"),
    [
        (np.ones((3, 100), bool), "has bool [3, 100]"),
        (np.ones((2, 100)), "has float64 [2, 100]"),
        (np.ones(100, bool), "has bool [100]"),
        (np.ones((2, 0), bool), "has bool [2, 0]"),
        (np.ones((2, 100), bool), "does not have the accuracies of metrics.jsonl"),
        (np.array([{}], object), "cannot be read (ValueError: Object arrays"),
    ],
)
def test_what_was_right_is_of_the_cells_epochs(tmp_path, table, what):
    folder = store.cell_folder(study(tmp_path / "s", ["mrt"], seeds=1, epochs=2), "mrt", 0)
    np.savez(folder / "correct.npz", correct=table)
    assert "correct.npz' is not as it was written" in outcomes.damage(folder)
    store.write_result(folder, json.loads((folder / "result.json").read_text()))
    assert what in outcomes.damage(folder)


def test_a_cell_that_was_judged_by_other_images_is_left_out(tmp_path):
    folder = study(tmp_path / "s", seeds=1, epochs=2)
    shutil.copytree(store.cell_folder(folder, "mrt", 0), tmp_path / "cell")
    at = store.cell_folder(folder, "mrt", 0)
    table = np.load(at / "correct.npz")["correct"]
    np.savez(at / "correct.npz", correct=np.concatenate([table, table], 1))
    store.write_result(at, json.loads((at / "result.json").read_text()))
    found = reading.read([folder])
    assert {cell.key[0] for cell in found.cells} == {"baseline", "flash", "flash+mrt"}
    (told,) = found.damaged
    assert told.startswith(f"'{at}' is not as study.json has it (200 validation images, not 100); restore")
