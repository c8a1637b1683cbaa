"""Files of a study, damaged or forged: named and left out, and nothing else changes."""

import errno
import json
import re
import shutil

import pytest
from faults.hostile import JSON, refusable, tries
from hypothesis import given
from hypothesis import strategies as st
from synthetic import study

from ablations.analysis.comparisons import compare
from ablations.reporting import compose, profiles, sections
from ablations.reporting.words import pays, sentences
from ablations.study import outcomes, reading, schema, store


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study with every kind of file that is read back."""
    folder = study(tmp_path_factory.mktemp("faults") / "study", seeds=2, epochs=2)
    store.write_json(folder / "margins.json", {"margins": {"accuracy": 1.0}, "looks": 2})
    profile = {
        "arm": "flash", "device": "cpu", "steps": 3, "wall_ms": 2.0, "profiled_ms": 3.0, "at_ms": [0.0, 1.0],
        "live": [8, 16], "operations": [{"name": "mm", "category": "other", "calls": 1, "ms": 1.0, "mib": 0.1}],
    }  # fmt: skip
    at = store.profile_folder(folder, "flash")
    at.mkdir()
    store.write_json(at / "profile.json", profile)
    compose.write([folder])
    return folder


READ = [
    "study.json", "timing.json", "margins.json", "cells/mrt/seed1/result.json", "cells/mrt/seed1/metrics.jsonl",
    "cells/mrt/seed1/correct.npz", "cells/mrt/seed1/tokens.npz", "cells/flash/profile/profile.json",
]  # fmt: skip


def damaged(content, kind, at, bit, other):
    """A file's content after a fault."""
    at %= max(len(content), 1)
    if kind == "flipped":
        return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]
    return {
        "emptied": b"", "truncated": content[:at], "zeroed": content[:at] + bytes(len(content) - at),
        "longer": content + other, "other": other, "of another": b"{}",
    }[kind]  # fmt: skip


@given(
    name=st.sampled_from(READ),
    kind=st.sampled_from(["flipped", "emptied", "truncated", "zeroed", "longer", "other", "of another"]),
    at=st.integers(0, 1 << 20),
    bit=st.integers(0, 7),
    other=st.binary(max_size=30) | JSON.map(lambda value: json.dumps(value).encode()),
)
@tries(150)
def test_a_damaged_file_is_told_and_nothing_else_changes(tried, whole, name, kind, at, bit, other):
    path, intact = whole / name, (whole / name).read_bytes()
    before = {cell.key: cell.result for cell in reading.read([whole]).cells}
    broken = damaged(intact, kind, at, bit, other)
    path.write_bytes(broken)
    try:
        with refusable(*["study.json"] * (name == "study.json") or ["never"]):
            comparisons = compare([whole])
            said = [*pays(comparisons), *sentences(comparisons)]
            after = {cell.key: cell.result for cell in comparisons.study.cells}
            assert all(before[key] == result for key, result in after.items())
            unharmed = name.endswith("tokens.npz") or same(intact, broken)
            assert unharmed or any(name in text for text in said), said
            assert unharmed or "seed1" not in name or ("mrt", 1) not in after
            if "seed1" in name and not name.endswith("tokens.npz"):
                assert outcomes.finished(path.parent) == (("mrt", 1) in after)
    finally:
        path.write_bytes(intact)
    tried["damaged files of a study"] += 1


def same(intact, broken):
    """Whether a fault left what a file says as it was: blanks, or the name of the seal."""
    if intact == broken:
        return True
    try:
        before, after = (schema.sealed(json.loads(content)) for content in (intact, broken))
    except (ValueError, AttributeError):
        return False
    return {k: before[k] for k in before if k != schema.SEAL} == {
        k: after[k] for k in before if k in after and k != schema.SEAL
    }


@given(data=st.data())
@tries(300)
def test_forged_values_are_refused_or_told(tried, whole, data):
    """Valid JSON without a seal, one of its values another: nothing raises but InputError, and no number that is not
    finite is told."""
    name = data.draw(st.sampled_from([n for n in READ if n.endswith((".json", ".jsonl"))]))
    path, intact = whole / name, (whole / name).read_bytes()
    lines = intact.splitlines() if name.endswith("l") else [intact]
    value = json.loads(lines[0])
    value.pop(schema.SEAL, None)
    inner = value
    while True:
        key = data.draw(st.sampled_from(sorted(inner)))
        if isinstance(inner[key], dict) and inner[key] and data.draw(st.booleans()):
            inner = inner[key]
            continue
        break
    if data.draw(st.booleans()):
        inner[key] = data.draw(JSON)
    else:
        del inner[key]
    result = path.with_name("result.json").read_bytes() if name.endswith("l") else b""
    path.write_bytes(b"\n".join([json.dumps(value).encode(), *lines[1:]]))
    if result:  # without the digests, the lines themselves are judged
        plain = {k: v for k, v in json.loads(result).items() if k not in ("files", schema.SEAL)}
        path.with_name("result.json").write_text(json.dumps(plain))
    try:
        with refusable():
            comparisons = compare([whole])
            told = [*pays(comparisons), *sentences(comparisons), *sections.arms(comparisons)]
            told += [*sections.verdicts(comparisons), *sections.effects(comparisons), sections.terms(comparisons)]
            told += sections.against_baseline(comparisons, comparisons.target)
            words = {word for line in told if "Left out" not in line for word in re.split(r"[^a-z]+", line)}
            assert not words & {"nan", "inf"}
    finally:
        path.write_bytes(intact)
        if result:
            path.with_name("result.json").write_bytes(result)
    tried["forged values in a study"] += 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"parameters": 1001}, "parameters 1001, not 1000"),
        ({"held_out": 5}, "held_out 5, not None"),
        ({"data": "cifar10"}, "data cifar10, not digits"),
        ({"batch_size": 64}, "batch_size 64, not 32"),
        ({"preset": "matched"}, "preset matched, not quick"),
        ({"precision": "bf16"}, "precision bf16, not auto"),
        ({"torch": "2.0"}, "torch 2.0, not 2.15.0"),
        ({"device": "cuda", "engine": "graphed"}, "device cuda, not auto, engine graphed, not auto"),
        ({"best_val_accuracy": 1.0}, "another best_val_accuracy than metrics.jsonl"),
        ({"final_train_loss": 0.0}, "another final_train_loss than metrics.jsonl"),
        ({"train_seconds": 1e-3}, "another train_seconds than metrics.jsonl"),
        ({"kept_bytes": 5}, "kept_bytes 5 are not those of kept_by_op"),
        ({"flops_per_image": "many"}, "flops_per_image: Input should be a valid integer"),
    ],
)
def test_a_result_that_was_forged_and_sealed_is_not_its_studys(tried, whole, change, told):
    at = store.cell_folder(whole, "mrt", 1)
    intact = (at / "result.json").read_bytes()
    store.write_result(at, json.loads(intact) | change)
    try:
        read = reading.read([whole])
        assert ("mrt", 1) not in {cell.key for cell in read.cells}
        assert [told in line for line in read.damaged] == [True]
    finally:
        (at / "result.json").write_bytes(intact)
    tried["forged results"] += 1


@pytest.mark.parametrize("joined", [False, True])
def test_a_seed_that_was_copied_does_not_count_twice(tried, whole, tmp_path, joined):
    """And is sealed as another."""
    shutil.copytree(whole, out := tmp_path / "study", ignore=shutil.ignore_patterns("report"))
    shutil.copytree(store.cell_folder(out, "mrt", 1), at := store.cell_folder(other := tmp_path / "other", "mrt", 7))
    shutil.copy(out / "study.json", other)
    store.write_result(at, json.loads((at / "result.json").read_bytes()) | {"seed": 7})
    if not joined:
        shutil.move(at, store.cell_folder(out, "mrt", 7))
    read = reading.read([out, other] if joined else [out])
    assert [cell.key[1] for cell in read.arms["mrt"]] == [0, 1]
    assert ["it is seed 1, copied" in line for line in read.damaged] == [True]
    tried["forged results"] += 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"arm": "mrt"}, "is of another arm (mrt)"),
        ({"at_ms": [1.0, 0.0]}, "times that go back"),
        ({"operations": [{"name": "x", "category": "y", "calls": 1, "ms": 1.0, "mib": 0.0}]}, "of no category (y)"),
    ],
)
def test_a_profile_that_was_forged_and_sealed_is_told(tried, whole, change, told):
    path = store.profile_folder(whole, "flash") / "profile.json"
    intact = path.read_bytes()
    store.write_json(path, json.loads(intact) | change)
    try:
        assert [told in line for line in reading.read([whole]).damaged] == [True]
        assert not profiles.profiled(reading.read([whole]))
    finally:
        path.write_bytes(intact)
    tried["forged profiles"] += 1


def test_further_keys_of_a_profile_are_let_be(whole):
    """As a flipped bit in the name of its seal makes one."""
    path = store.profile_folder(whole, "flash") / "profile.json"
    intact = path.read_bytes()
    path.write_bytes(intact.replace(b'"sha256"', b'"rha256"').replace(b'"mib"', b'"more": 1, "mib"'))
    try:
        assert len(profiles.profiled(reading.read([whole]))) == 1
    finally:
        path.write_bytes(intact)


def test_a_folder_that_nobody_may_look_into_is_told(tried, whole, monkeypatch):
    """The tests may be root's, who may look into all."""
    monkeypatch.setattr(reading, "_open", lambda folder: folder.name != "mrt")
    assert ["cells/mrt' cannot be read (permission denied)" in line for line in reading.read([whole]).damaged] == [True]
    tried["damaged files of a study"] += 1


def test_a_file_that_no_memory_holds_is_told(tried, whole, monkeypatch):
    def full(path):
        raise MemoryError

    path = whole / "timing.json"
    monkeypatch.setattr(type(path), "read_bytes", full)
    with pytest.raises(schema.Damaged, match=r"timing.json' cannot be read \(it does not fit into memory\)"):
        schema.content(path)
    tried["damaged files of a study"] += 1


@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl", "correct.npz"])
def test_a_cell_whose_files_may_be_whole_is_not_trained_again(tried, whole, monkeypatch, name):
    """Too many files are open, or a network's file system is away."""
    folder, read = store.cell_folder(whole, "mrt", 1), type(whole).read_bytes

    def away(path):
        if path.name == name:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(path)

    outcomes._damage.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(type(whole), "read_bytes", away)
        with pytest.raises(schema.Unread, match=f"{name}' cannot be read .*Stale file handle"):
            outcomes.finished(folder)
    assert outcomes.finished(folder)
    tried["damaged files of a study"] += 1


@pytest.mark.parametrize("arm", ["decatt+decatt", "mrt+flash", "flash@"])
def test_a_timing_pass_of_no_arm_is_told(tried, whole, arm):
    path, intact = whole / "timing.json", (whole / "timing.json").read_bytes()
    blocks = [[*took, [arm, 0.01]] for took in json.loads(intact)["blocks"]]
    store.write_json(path, json.loads(intact) | {"blocks": blocks})
    try:
        assert any("timing.json' is of no arm" in text for text in compare([whole]).unread)
    finally:
        path.write_bytes(intact)
    tried["forged timing passes"] += 1


@pytest.mark.parametrize(
    "change",
    [{"looks": 2**62}, {"looks": 10_000}, {"looks": 0}, {"margins": {"accuracy": 1001.0}}, {"margins": {"acc": 1.0}}],
)
def test_margins_that_no_command_writes_are_told(tried, whole, change):
    path, intact = whole / "margins.json", (whole / "margins.json").read_bytes()
    store.write_json(path, json.loads(intact) | change)
    try:
        assert any("margins.json" in text for text in compare([whole]).unread)
    finally:
        path.write_bytes(intact)
    tried["forged margins"] += 1


@given(st.binary(max_size=200))
@tries(200)
def test_a_line_of_metrics_is_a_row_or_damaged(tried, line):
    with refusable("metrics.jsonl"):
        assert 0 <= schema.parse(line, schema.Line, "metrics.jsonl")["val/accuracy"] <= 1
    tried["lines of metrics"] += 1
