import errno
import json
import os
import shutil
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

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


def test_coarse_labels(image_folder, tmp_path):
    for part in ("train", "val"):
        shutil.copytree(image_folder / part / "dark", image_folder / part / "black")
    table = {"dark": "night", "black": "night", "bright": "day"}
    (image_folder / "coarse.json").write_text(json.dumps({"fine_to_coarse": table}))
    loaded = data.load(f"folder:{image_folder}@coarse", tmp_path / "root")
    assert loaded.classes == ("day", "night")
    assert loaded.val.labels.tolist() == [1] * 4 + [0] * 4 + [1] * 4


def test_missing_folder(tmp_path):
    refused("folder:", tmp_path, "data 'folder:' names no folder; write folder:PATH")
    refused(f"folder:{tmp_path}/nowhere", tmp_path, "nowhere' does not exist; pass --data folder:PATH")
    (tmp_path / "a.zip").touch()
    refused(f"folder:{tmp_path}/a.zip", tmp_path, "a.zip' is no folder; pass --data folder:PATH")


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
    refused(f"folder:{image_folder}", tmp_path / "root", r"train/ and val/ have different classes.*'dark', 'dim'")
    for part, name in (("val/dim", "caf\u00e9"), ("train/dark", "cafe\u0301")):
        (image_folder / part).rename((image_folder / part).with_name(name))
    refused(f"folder:{image_folder}", tmp_path / "root", r"in one of them only: 'cafe\\u0301', 'caf\\xe9'")


def test_undecodable_image(image_folder, tmp_path):
    (image_folder / "val" / "dark" / "0.png").write_bytes(b"not an image")
    refused(f"folder:{image_folder}", tmp_path / "root", r"dark/0.png' cannot be decoded as an image")


def test_truncated_image(image_folder, tmp_path):
    file = image_folder / "train" / "dark" / "3.png"
    file.write_bytes(file.read_bytes()[:-40])
    refused(f"folder:{image_folder}", tmp_path / "root", r"dark/3.png' cannot be decoded as an image")


@pytest.mark.parametrize("name", ["z.png", "dim"])
def test_what_is_in_no_class_is_named(image_folder, tmp_path, name):
    """An image beside the classes; a class that is a link to nothing."""
    (image_folder / "train" / name).symlink_to("dark/0.png" if name == "z.png" else "nowhere")
    refused(f"folder:{image_folder}", tmp_path / "root", rf"train/{name}', 1 in all, is in no class")


def test_hidden_copies_are_no_images(image_folder, tmp_path):
    """Those of notebooks, file servers and archives."""
    for name in (".ipynb_checkpoints/0-checkpoint.png", "@eaDir/0.png/SYNOPHOTO_THUMB_M.png", "._0.png"):
        (image_folder / "train" / "dark" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image_folder / "train" / "dark" / "0.png", image_folder / "train" / "dark" / name)
    assert len(data.load(f"folder:{image_folder}", tmp_path / "root").train.labels) == 24


def test_what_is_transparent_is_on_white(image_folder, tmp_path):
    """Black ink, and black where there is none."""
    ink = np.zeros((8, 8, 4), np.uint8)
    ink[2, :, 3] = 255
    add(image_folder, Image.fromarray(ink), "z.gif")
    loaded = data.load(f"folder:{image_folder}", tmp_path / "root")
    expected = torch.full((3, 8, 8), 255, dtype=torch.uint8)
    expected[:, 2] = 0
    assert sum(torch.equal(image, expected) for image in loaded.train.images) == 1


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


def add(image_folder, picture, name="z.png", **options):
    picture.save(image_folder / "train" / "dark" / name, **options)


@pytest.mark.parametrize(
    ("picture", "name", "options", "expected"),
    [
        (Image.fromarray(np.full((8, 8), 0.5, np.float32)), "z.tif", {}, "its pixels are floating-point numbers"),
        (Image.fromarray(np.full((8, 8), 70_000, np.int32)), "z.tif", {}, "its pixels are 70000 to 70000, beyond 16"),
        (
            Image.new("RGB", (8, 8)),
            "z.tif",
            {"save_all": True, "append_images": [Image.new("RGB", (8, 8))]},
            "it has 2 frames; keep one",
        ),
    ],
)
def test_pixels_that_nothing_tells_how_to_show_are_refused(image_folder, tmp_path, picture, name, options, expected):
    add(image_folder, picture, name, **options)
    refused(f"folder:{image_folder}", tmp_path / "root", rf"dark/{name}' cannot be decoded as an image \({expected}")


def test_a_declared_size_is_refused_before_it_is_decoded(image_folder, tmp_path):
    """A PNG of 65,000 x 65,000 pixels that has none."""
    header = b"IHDR" + (65_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    chunks = [header, b"IDAT" + zlib.compress(b""), b"IEND"]
    content = b"".join((len(c) - 4).to_bytes(4, "big") + c + zlib.crc32(c).to_bytes(4, "big") for c in chunks)
    (image_folder / "train" / "dark" / "z.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    refused(f"folder:{image_folder}", tmp_path / "root", r"z.png' cannot be decoded as an image \(Image size", image=8)


def test_a_picture_is_upright(image_folder, tmp_path):
    """EXIF orientation 6: to be turned by a quarter clockwise."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    add(image_folder, Image.fromarray(pixels), exif=exif)
    loaded = data.load(f"folder:{image_folder}", tmp_path / "root")
    expected = torch.from_numpy(np.rot90(pixels, -1).transpose(2, 0, 1).copy())
    assert sum(torch.equal(image, expected) for image in loaded.train.images) == 1


def test_cmyk_is_shown_as_rgb(image_folder, tmp_path):
    add(image_folder, Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "z.tif")
    loaded = data.load(f"folder:{image_folder}", tmp_path / "root")
    assert any(image[:, 0, 0].tolist() == [0, 255, 255] for image in loaded.train.images)


def test_what_is_no_file_is_named_and_not_waited_for(image_folder, tmp_path):
    os.mkfifo(image_folder / "train" / "dark" / "z.png")
    refused(f"folder:{image_folder}", tmp_path / "root", "z.png' cannot be decoded as an image .it is no regular file")


def test_no_image_counts_twice(image_folder, tmp_path):
    (image_folder / "train" / "dark" / "round").symlink_to(".")
    (image_folder / "train" / "dark" / "away").symlink_to("away")
    assert len(data.load(f"folder:{image_folder}", tmp_path / "root").train.labels) == 24
    (image_folder / "train" / "dark" / "z.png").symlink_to("0.png")
    with pytest.raises(InputError, match=r"z.png' and '.*0.png' are one file, by a link; keep one of them"):
        data.load(f"folder:{image_folder}", tmp_path / "root")


def test_what_is_learned_is_not_what_is_judged(image_folder, tmp_path):
    shutil.rmtree(image_folder / "val")
    (image_folder / "val").symlink_to("train")
    refused(f"folder:{image_folder}", tmp_path / "root", "are one file, by a link")


def test_a_copy_of_what_is_learned_judges_nothing(image_folder, tmp_path):
    shutil.rmtree(image_folder / "val")
    shutil.copytree(image_folder / "train", image_folder / "val")
    refused(f"folder:{image_folder}", tmp_path / "root", "has the same images to learn and to judge by: a copy")


def test_single_copies_are_told(image_folder, tmp_path):
    """Byte by byte, or the same pixels in another file."""
    assert not data.load(f"folder:{image_folder}", tmp_path / "root").note
    learned, judged = image_folder / "train" / "dark" / "3.png", image_folder / "val" / "bright"
    shutil.copy(learned, judged / "1.png")
    Image.open(learned).save(judged / "z.bmp")
    told = f"2 of the 9 validation images are learned, too, such as '{judged}/1.png', which is '{learned}'"
    twice = f"2 images are in two classes, such as '{judged}/1.png', which is '{learned}': one of the labels is wrong"
    for _ in ("decoded", "cached"):
        note = data.load(f"folder:{image_folder}", tmp_path / "root").note
        assert told in note
        assert twice in note


def test_one_class_is_refused(image_folder, tmp_path):
    for part in ("train", "val"):
        shutil.rmtree(image_folder / part / "dark")
    refused(f"folder:{image_folder}", tmp_path / "root", r"has one class \(bright\): nothing to tell apart")


@pytest.mark.parametrize("name", ["..a", "[bold]", "<b>|", "a\nb", "é", "\udcff"])
def test_classes_may_be_called_anything(image_folder, tmp_path, name):
    for part in ("train", "val"):
        (image_folder / part / "dark").rename(image_folder / part / name)
    loaded = data.load(f"folder:{image_folder}", tmp_path / "root")
    assert name in loaded.classes
    assert len(loaded.digest()) == 64


def test_a_full_disk_is_one_message(image_folder, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    refused(f"folder:{image_folder}", tmp_path / "root", r"24 images of 8x8 pixels take 0 MiB.*No space left.*--data-r")
