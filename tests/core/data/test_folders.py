import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from core.data import folders
from core.data import sets as data
from core.errors import InputError


def refused(name, root, match, **options):
    with pytest.raises(InputError, match=match):
        data.load(name, root, **options)
    cache = root / "cache"
    assert not cache.exists() or not list(cache.iterdir())  # nothing half-written


def test_folder(image_folder, tmp_path):
    loaded = data.load(f"folder:{image_folder}", tmp_path / "root")
    assert loaded.classes == ("bright", "dark")
    assert loaded.train.images.shape == (24, 3, 8, 8)
    assert loaded.val.labels.tolist() == [0] * 4 + [1] * 4
    pixels = np.asarray(Image.open(image_folder / "train" / "dark" / "0.png")).transpose(2, 0, 1)
    assert any(torch.equal(image, torch.from_numpy(pixels.copy())) for image in loaded.train.images)


def test_folder_is_decoded_once(image_folder, tmp_path, monkeypatch):
    first = data.load(f"folder:{image_folder}", tmp_path / "root")
    monkeypatch.setattr(folders, "_open", lambda file: pytest.fail(f"decoded {file} again"))
    again = data.load(f"folder:{image_folder}", tmp_path / "root")
    assert torch.equal(first.train.images, again.train.images)
    assert (first.mean, first.std) == (again.mean, again.std)


def test_a_changed_file_is_decoded_again(image_folder, tmp_path):
    before = data.load(f"folder:{image_folder}", tmp_path / "root")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(image_folder / "train" / "bright" / "0.png")
    after = data.load(f"folder:{image_folder}", tmp_path / "root")
    assert not torch.equal(before.train.images, after.train.images)


def test_grey_and_odd_sized_images_become_square_rgb(image_folder, tmp_path):
    Image.fromarray(np.full((20, 10), 77, np.uint8)).save(image_folder / "train" / "dark" / "grey.jpg")
    loaded = data.load(f"folder:{image_folder}", tmp_path / "root", image=6)
    assert loaded.train.images.shape == (25, 3, 6, 6)
    assert any((image == 77).all() for image in loaded.train.images)


def test_16_bit_pixels_keep_their_range(image_folder, tmp_path):
    ramp = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040).astype(np.uint16)
    Image.fromarray(ramp).save(image_folder / "train" / "dark" / "deep.png")
    loaded = data.load(f"folder:{image_folder}", tmp_path / "root")
    expected = torch.from_numpy((ramp / 257).round().astype(np.uint8))
    assert any(torch.equal(image[0], expected) for image in loaded.train.images)


def test_a_broken_link_is_named(image_folder, tmp_path):
    (image_folder / "val" / "dark" / "gone.png").symlink_to("nowhere.png")
    refused(f"folder:{image_folder}", tmp_path / "root", r"gone.png' cannot be read")


def test_two_processes_may_decode_the_same_folder(image_folder, tmp_path, monkeypatch):
    decode, name, root = folders._decode, f"folder:{image_folder}", tmp_path / "root"

    def beaten(*arguments):
        decode(*arguments)
        if arguments[-1].name == "val.npy":
            monkeypatch.setattr(folders, "_decode", decode)
            data.load(name, root)  # the other process, done first

    monkeypatch.setattr(folders, "_decode", beaten)
    assert data.load(name, root).train.images.shape == (24, 3, 8, 8)
    assert len(list((root / "cache").iterdir())) == 1


def test_coarse_labels(image_folder, tmp_path):
    (image_folder / "coarse.json").write_text(json.dumps({"fine_to_coarse": {"dark": "any", "bright": "any"}}))
    loaded = data.load(f"folder:{image_folder}@coarse", tmp_path / "root")
    assert loaded.classes == ("any",)
    assert loaded.train.labels.unique().tolist() == [0]


def test_missing_folder(tmp_path):
    refused(f"folder:{tmp_path}/nowhere", tmp_path, "nowhere' does not exist; pass --data folder:PATH")


def test_folder_without_splits(tmp_path):
    refused(f"folder:{tmp_path}", tmp_path, "needs a folder train/ and one of val/, test/")


def test_empty_split(image_folder, tmp_path):
    for name in ("bright", "dark"):
        shutil.rmtree(image_folder / "train" / name)
    refused(f"folder:{image_folder}", tmp_path / "root", "train' is empty: it needs one folder of images a class")


def test_class_without_images(image_folder, tmp_path):
    (image_folder / "train" / "empty").mkdir()
    refused(f"folder:{image_folder}", tmp_path / "root", "no images in class empty; file names must end in")


def test_different_classes(image_folder, tmp_path):
    (image_folder / "val" / "dark").rename(image_folder / "val" / "dim")
    refused(f"folder:{image_folder}", tmp_path / "root", r"train/ and val/ have different classes.*dark, dim")


def test_undecodable_image(image_folder, tmp_path):
    (image_folder / "val" / "dark" / "0.png").write_bytes(b"not an image")
    refused(f"folder:{image_folder}", tmp_path / "root", r"dark/0.png' cannot be decoded as an image")


def test_truncated_image(image_folder, tmp_path):
    file = image_folder / "train" / "dark" / "3.png"
    file.write_bytes(file.read_bytes()[:-40])
    refused(f"folder:{image_folder}", tmp_path / "root", r"dark/3.png' cannot be decoded as an image")


def test_sizes_that_differ(image_folder, tmp_path):
    Image.new("RGB", (9, 9)).save(image_folder / "train" / "dark" / "z.png")
    refused(f"folder:{image_folder}", tmp_path / "root", r"z.png' is 9x9, others 8x8; pass --image N")


def test_coarse_without_a_table(image_folder, tmp_path):
    refused(f"folder:{image_folder}@coarse", tmp_path / "root", "coarse.json' does not exist: @coarse needs it")
    (image_folder / "coarse.json").write_text("[]")
    refused(f"folder:{image_folder}@coarse", tmp_path / "root", "has no readable fine_to_coarse table")
    (image_folder / "coarse.json").write_text('{"fine_to_coarse": {"dark": 1}}')
    refused(f"folder:{image_folder}@coarse", tmp_path / "root", "must give each class the name of its coarse class")
    (image_folder / "coarse.json").write_text('{"fine_to_coarse": {"dark": "any"}}')
    refused(f"folder:{image_folder}@coarse", tmp_path / "root", "no coarse class for bright")
