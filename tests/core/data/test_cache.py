"""A folder of images is decoded once, and again when anything of it has changed."""

import fcntl
import os

import numpy as np
import pytest
import torch
from PIL import Image

from core.data import pictures
from core.data import sets as data


def test_folder_is_decoded_once(image_folder, tmp_path, monkeypatch):
    first = data.load(f"folder:{image_folder}", tmp_path / "root")
    monkeypatch.setattr(pictures, "_open", lambda file: pytest.fail(f"decoded {file} again"))
    again = data.load(f"folder:{image_folder}", tmp_path / "root")
    assert torch.equal(first.train.images, again.train.images)
    assert (first.mean, first.std) == (again.mean, again.std)


def _swap(one, other):
    one.rename(one.with_name("t"))
    other.rename(one)
    one.with_name("t").rename(other)


CHANGES = {
    "another": lambda train: Image.new("RGB", (8, 8)).save(train / "bright" / "0.bmp"),
    "swapped files": lambda train: _swap(train / "bright" / "0.bmp", train / "dark" / "0.bmp"),
    "swapped classes": lambda train: _swap(train / "bright", train / "dark"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_decoded_again(image_folder, tmp_path, change):
    """Of one size and one time, as they come out of an archive."""
    for file in sorted(image_folder.rglob("*.png")):
        Image.open(file).save(file.with_suffix(".bmp"))
        file.unlink()

    def loaded():
        for file in image_folder.rglob("*.bmp"):
            os.utime(file, (1e9, 1e9))
        return data.load(f"folder:{image_folder}", tmp_path / "root")

    before = loaded()
    CHANGES[change](image_folder / "train")
    assert not torch.equal(before.train.images, loaded().train.images)


def test_two_processes_may_decode_the_same_folder(image_folder, tmp_path, monkeypatch):
    decode, name, root = pictures.decode, f"folder:{image_folder}", tmp_path / "root"

    def beaten(*arguments):
        decode(*arguments)
        if arguments[-1].name == "val.npy":
            monkeypatch.setattr(pictures, "decode", decode)
            data.load(name, root)  # the other process, done first

    monkeypatch.setattr(pictures, "decode", beaten)
    assert data.load(name, root).train.images.shape == (24, 3, 8, 8)
    assert len(list((root / "cache").iterdir())) == 1


@pytest.mark.parametrize(
    "fault", ["flipped", "swapped", "fewer", "emptied", "gone", "undescribed", "misdescribed", "negative"]
)
def test_a_damaged_cache_is_made_anew(image_folder, tmp_path, fault):
    name, root = f"folder:{image_folder}", tmp_path / "root"
    before = data.load(name, root)
    images, labels, mean = before.train.images.clone(), before.val.images.clone(), before.mean
    del before
    (cache,) = (root / "cache").iterdir()
    train, val, about = (cache / part for part in ("train.npy", "val.npy", "about.json"))
    if fault == "flipped":
        content = bytearray(train.read_bytes())
        content[-1] ^= 1
        train.write_bytes(content)
    elif fault == "swapped":
        val.write_bytes(train.read_bytes())
    elif fault == "fewer":
        np.save(train, np.load(train)[:-1])
    elif fault == "negative":
        train.write_bytes(train.read_bytes().replace(b"(24,", b"(-4,"))
    elif fault == "undescribed":
        about.write_text("[]")
    elif fault == "misdescribed":
        about.write_text(about.read_text().replace('"statistics": [[0.', '"statistics": [[0.9'))
    else:
        train.write_bytes(b"") if fault == "emptied" else train.unlink()
    after = data.load(name, root)
    assert torch.equal(after.train.images, images)
    assert torch.equal(after.val.images, labels)
    assert after.mean == mean
    assert [path.name for path in (root / "cache").iterdir()] == [cache.name]


def test_caches_of_what_was_are_removed(image_folder, tmp_path):
    name, root = f"folder:{image_folder}", tmp_path / "root"
    data.load(name, root)
    kept = data.load(name, root, 6)
    (image_folder / "train" / "dark" / "0.png").unlink()
    assert len(data.load(name, root).train.labels) == 23
    assert len(list((root / "cache").iterdir())) == 2  # at its own size and at 6 pixels
    assert len(kept.train.images) == 24


def test_what_is_no_file_among_caches_is_not_waited_for(image_folder, tmp_path):
    (tmp_path / "cache" / "mine").mkdir(parents=True)
    os.mkfifo(tmp_path / "cache" / "mine" / "about.json")
    assert len(data.load(f"folder:{image_folder}", tmp_path).train.labels) == 24


def test_what_killed_processes_decoded_is_removed(image_folder, tmp_path):
    (tmp_path / "cache" / ".decoding-dead").mkdir(parents=True)
    (tmp_path / "cache" / ".decoding-alive").mkdir()
    for folder in (tmp_path / "cache").iterdir():
        os.utime(folder, (0, 0))
    handle = os.open(tmp_path / "cache" / ".decoding-alive", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    data.load(f"folder:{image_folder}", tmp_path)
    os.close(handle)
    assert [path.name for path in (tmp_path / "cache").glob(".*")] == [".decoding-alive"]
