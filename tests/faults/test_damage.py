"""What a cut-short study leaves, damaged: told, never believed, and the end is the same."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
from faults.processes import OPTIONS, ROOT, content, environment, until
from safetensors import safe_open
from safetensors.torch import save

CUTS = {
    "truncated": lambda data, draw: data[: draw.randrange(len(data))],
    "emptied": lambda data, draw: b"",
    "flipped": lambda data, draw: _flipped(data, draw.randrange(len(data))),
}


def _flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]


@pytest.fixture
def cut_short(start, tmp_path):
    """cut_short(name) -> a study's folder whose second cell was killed after some snapshots."""

    def make(name):
        out = tmp_path / name
        run = start(out)
        until(lambda: len(list(out.glob("cells/decatt/*.snapshots/0*"))) == 2)
        run.kill()
        return out

    return make


def _forge(path):
    """What no course wrote, under its own checksum."""
    with safe_open(path, framework="pt") as file:
        said, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    data = save(tensors, said | {"about": json.dumps({"times": None})})
    path.unlink()
    path.with_name(f"{path.name[:9]}-{hashlib.sha256(data).hexdigest()[:16]}.safetensors").write_bytes(data)


@pytest.mark.parametrize(("kind", "which"), [("truncated", 1), ("emptied", 2), ("flipped", 1), ("forged", 1)])
def test_damaged_snapshots(cut_short, start, reference, many, tried, draw, kind, which):
    """The last one, and both."""
    for i in range(many(1, 10)):
        out = cut_short(str(i))
        for path in sorted(out.glob("cells/decatt/*.snapshots/0*"))[-which:]:
            _forge(path) if kind == "forged" else path.write_bytes(CUTS[kind](path.read_bytes(), draw))
        run = start(out)
        assert run.wait() == 0
        assert run.text.count("is damaged") == which
        assert ("continued from step" in run.text) == (which == 1)
        assert content(out) == reference()[0]
        tried["damaged snapshots"] += which


def test_anything_else_that_is_left_is_made_anew(cut_short, start, reference, many, tried, draw):
    """Every file of the cell and its claim, whatever happened to it; snapshots of another cell are not continued."""
    for i in range(many(1, 30)):
        out = cut_short(str(i))
        for path in [*out.glob("cells/decatt/seed0/*"), *out.glob("cells/decatt/*.claim-*")]:
            data = path.read_bytes()
            path.write_bytes(CUTS[draw.choice(list(CUTS))](data, draw) if data else b"x")
            tried["damaged leftovers"] += 1
        (out / "cells" / "decatt" / "seed0.snapshots" / ".000000001-0.safetensors.1.partial").write_bytes(b"torn")
        (out / "cells" / "decatt" / "seed0.snapshots").rename(other := out / "cells" / "baseline" / "seed0.snapshots")
        shutil.rmtree(other.with_name("seed0"))
        for claim in out.glob("cells/decatt/*.claim-*"):  # unreadable, it is free when its heartbeat is old
            os.utime(claim, (0, 0))
        run = start(out)
        assert run.wait() == 0
        assert run.text.count("is of another cell (arm decatt -> baseline)") == 2
        assert content(out) == reference()[0]


def test_a_full_disk(tmp_path, reference, many, tried):
    """On a file system of so many KiB; then it has room, and the same command goes on."""
    expected, _ = reference()
    script = ROOT / "tests" / "faults" / "study.py"
    command = f"{sys.executable} {script} {' '.join(OPTIONS)} --out $DISK/study"
    for size in many((100, 180), range(80, 240, 10)):
        disk = tmp_path / str(size)
        disk.mkdir()
        shell = f"""
            mount -t tmpfs -o size={size}k tmpfs $DISK || exit 77
            {command} > $DISK.first 2>&1; echo $? > $DISK.status
            mount -o remount,size=64m $DISK
            {command} > $DISK.second 2>&1 || exit 1
            cp -r $DISK/study $DISK.kept
        """
        where = environment() | {"DISK": str(disk)}
        done = subprocess.run(["unshare", "-Urm", "sh", "-c", shell], env=where, capture_output=True, text=True)
        if done.returncode == 77 or "unshare" in done.stderr:
            pytest.skip(f"no file system can be mounted here: {done.stderr}")
        first = disk.with_name(f"{size}.first").read_text()
        assert disk.with_name(f"{size}.status").read_text() == "2\n", first
        assert "Traceback" not in first
        assert "free some" in first
        assert done.returncode == 0, disk.with_name(f"{size}.second").read_text()
        assert content(disk.with_name(f"{size}.kept")) == expected
        tried["full disks"] += 1


def test_a_cell_that_kills_its_process_fails_at_the_second_time(start, tmp_path, tried):
    """So that restarts cannot loop; the others run, and it is trained again when asked."""
    out, dies = tmp_path / "study", {"DIES": "decatt"}
    for _ in range(2):
        assert start(out, **dies).wait() == -9
        tried["crashing arms"] += 1
    run = start(out, **dies)
    assert run.wait() == 1
    assert (
        "its process died 2 times at step 0"
        in json.loads((out / "cells/decatt/seed0/failed.json").read_text())["error"]
    )
    assert (out / "cells/crs@0.5/seed0/result.json").exists()
    assert start(out, "--retry-failed").wait() == 0
