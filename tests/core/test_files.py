"""Files are written whole or not at all."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from core import files
from core.errors import InputError


def test_what_is_written_is_there_alone(tmp_path):
    os.umask(0o022)
    files.write(tmp_path / "a", b"old")
    files.write(tmp_path / "a", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"new")]
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("at", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_what_was(tmp_path, monkeypatch, at):
    files.write(tmp_path / "a", b"old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    if at == "write":
        monkeypatch.setattr(Path, "open", full)
    else:
        monkeypatch.setattr(os, at, full)
    with pytest.raises(OSError, match="No space left on device: '.*a'"):
        files.write(tmp_path / "a", b"new")
    monkeypatch.undo()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_a_signal_leaves_what_was(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    files.write(tmp_path / "a", b"old")
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write(tmp_path / "a", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_file_system_that_syncs_no_folders_is_written_to(tmp_path, monkeypatch):
    sync = os.fsync

    def unable(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(22, "Invalid argument")
        sync(handle)

    monkeypatch.setattr(os, "fsync", unable)
    files.write(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_file_system_that_does_not_tell_its_size_is_not_full(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(total=0, free=0))
    assert files.room(tmp_path) > 2**60


def test_nothing_is_removed_that_holds_something(tmp_path):
    (mine := tmp_path / "result.json" / "mine").mkdir(parents=True)
    (link := tmp_path / "link").symlink_to(mine.parent)
    for gone in (link, tmp_path / "nothing", mine):
        files.remove(gone)
        assert not os.path.lexists(gone)
    mine.touch()
    with pytest.raises(OSError, match="not empty: .*result.json"):
        files.remove(mine.parent)
    assert mine.exists()


def test_digests_tell_values_shapes_types_and_names():
    a = torch.arange(6, dtype=torch.float32)
    different = [a, a + 1, a.reshape(2, 3), a.double(), a.to(torch.bfloat16), a[:0]]
    assert len({files.digest(t) for t in different}) == len(different)
    assert files.digest(a.reshape(2, 3).mT.contiguous().mT) == files.digest(a.reshape(2, 3))
    assert files.digests({"a": a, "b": a + 1}) == files.digests({"b": a + 1, "a": a})
    assert files.digests({"a": a, "b": a + 1}) != files.digests({"b": a, "a": a + 1})


def test_a_digest_is_of_all_pieces(monkeypatch):
    values = torch.arange(100)
    whole = files.digest(values)
    monkeypatch.setattr(files, "_PIECE", 7)
    assert files.digest(values) == whole


def test_no_device_or_pipe_gives_way_to_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(InputError, match=f"{name}' is a device or a pipe, where a file has to be; move it"):
            files.write(tmp_path / name, b"new")
    assert (tmp_path / "link").is_fifo()
    assert len(list(tmp_path.iterdir())) == 2
