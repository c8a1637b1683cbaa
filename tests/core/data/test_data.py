import builtins
import gzip
import json
import shutil
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from core.data import sets as data
from core.data.cifar100 import COARSE_CLASSES, COARSE_OF_FINE
from core.errors import InputError


def test_digits_are_the_1797_real_ones(tmp_path):
    digits = data.load("digits", tmp_path)
    assert digits.train.images.shape == (1437, 3, 24, 24)
    assert digits.val.images.shape == (360, 3, 24, 24)
    assert digits.train.images.dtype == torch.uint8
    assert not digits.mirrors
    labels = torch.cat((digits.train.labels, digits.val.labels))
    assert torch.bincount(labels).tolist() == np.bincount(load_digits().target).tolist()
    assert torch.bincount(digits.val.labels).min() >= 34  # a fifth of every class


def test_five_seeds_hold_out_every_digit_once(tmp_path):
    base = data.load("digits", tmp_path, image=8)
    first = base.holding_out(0)
    assert all(torch.equal(a, b) for a, b in zip((*base.train, *base.val), (*first.train, *first.val), strict=True))
    everything = sorted(map(bytes, torch.cat((base.train.images, base.val.images))[:, 0].reshape(1797, 64).numpy()))
    seen = []
    for seed in range(5):
        held = base.holding_out(seed)
        parts = [sorted(map(bytes, part.images[:, 0].reshape(-1, 64).numpy())) for part in (held.train, held.val)]
        assert sorted(parts[0] + parts[1]) == everything
        counts = torch.bincount(held.val.labels)
        assert set(counts.tolist()) <= {34, 35, 36, 37}  # a fifth of every class, of 174 to 183
        assert (base.mean, base.std) == (held.mean, held.std)
        seen += parts[1]
        again = base.holding_out(seed + 5)
        assert torch.equal(again.val.images, held.val.images)
        assert base.held_out(seed + 5) == seed
    assert sorted(seen) == everything
    turned = base.holding_out(3).holding_out(1)
    assert sorted(map(bytes, turned.val.images.numpy())) == sorted(map(bytes, base.holding_out(1).val.images.numpy()))


def test_other_data_hold_out_the_same_at_every_seed(image_folder, tmp_path):
    loaded = data.load(f"folder:{image_folder}", tmp_path)
    assert loaded.holding_out(3) is loaded
    assert loaded.held_out(3) is None


@pytest.fixture
def idx(tmp_path, monkeypatch):
    """idx(folder): Fashion-MNIST's four files with 4 + 2 images, pixel by pixel 0, 1, 2, …, below the folder."""
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "none")

    def write(folder):
        folder.mkdir(parents=True)
        for part, count in (("train", 4), ("t10k", 2)):
            pixels = (np.arange(count * 28 * 28) % 256).astype(np.uint8).tobytes()
            images = struct.pack(">HBBIII", 0, 8, 3, count, 28, 28) + pixels
            labels = struct.pack(">HBBI", 0, 8, 1, count) + bytes(range(count))
            (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
            (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))

    return write


@pytest.mark.parametrize("where", ["root/fashion-mnist", "root", "root/FashionMNIST/raw", "none/fashion-mnist"])
def test_fashion_mnist_is_found_and_has_one_channel(where, tmp_path, idx):
    idx(tmp_path / where)
    loaded = data.load("fashion-mnist", tmp_path / "root")
    assert loaded.train.images.shape == (4, 1, 28, 28)
    assert loaded.train.images.flatten().tolist() == [i % 256 for i in range(4 * 784)]
    assert loaded.val.labels.tolist() == [0, 1]
    assert loaded.classes[:2] == ("T-shirt/top", "Trouser")
    assert loaded.mirrors
    assert len(loaded.mean) == 1
    assert data.load("fashion-mnist", tmp_path / "root", 16).val.images.shape == (2, 1, 16, 16)


def test_a_damaged_idx_file_is_one_message(tmp_path, idx):
    idx(tmp_path / "root")
    file = tmp_path / "root" / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:-1]))
    with pytest.raises(InputError, match="t10k-images-idx3-ubyte.gz' cannot be read"):
        data.load("fashion-mnist", tmp_path / "root")


def test_mnist_that_cannot_be_fetched_is_one_message(tmp_path, monkeypatch, idx):
    def offline(*args, **options):
        raise RuntimeError("no network")

    monkeypatch.setattr(data._torchvision_datasets(), "MNIST", offline)
    with pytest.raises(InputError, match=r"could not be downloaded \(no network\); put its four .gz files into"):
        data.load("mnist", tmp_path)


def test_outlines_are_as_the_data_are(tmp_path, idx):
    idx(tmp_path / "fashion-mnist")
    for name in ("digits", "fashion-mnist"):
        loaded, outlined = data.load(name, tmp_path), data.outline(name, tmp_path)
        assert outlined.train.images.shape[1:] == loaded.train.images.shape[1:]
        assert outlined.mirrors == loaded.mirrors
        assert len(outlined.classes) == len(loaded.classes)
        assert len(outlined.mean) == len(loaded.mean)
    assert len(data.outline("mnist").train.labels) == 60_000
    assert not data.outline("mnist").mirrors


def test_digits_at_8_pixels_are_the_stored_values(tmp_path):
    digits = data.load("digits", tmp_path, image=8)
    images = torch.cat((digits.train.images, digits.val.images))
    assert torch.equal(images[:, 0], images[:, 2])
    ours = sorted(map(bytes, images[:, 0].reshape(1797, 64).numpy()))
    stored = np.rint(load_digits().data * 255 / 16).astype(np.uint8)
    assert ours == sorted(map(bytes, stored))


def test_resizing_in_pieces_gives_the_same_pixels(monkeypatch):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (7, 3, 8, 8)).astype(np.uint8))
    whole = data._resize(images, 20)
    expected = torch.nn.functional.interpolate(images.float(), (20, 20), mode="bilinear", antialias=True)
    assert torch.equal(whole, expected.round().to(torch.uint8))
    monkeypatch.setattr(data, "_PIECE", 2 * 3 * 20 * 20 * 4)
    assert torch.equal(data._resize(images, 20), whole)


def test_statistics_equal_numpy():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (50, 3, 6, 6)).astype(np.uint8))
    mean, std = data.statistics(images)
    assert mean == pytest.approx((images.numpy() / 255).mean((0, 2, 3)))
    assert std == pytest.approx((images.numpy() / 255).std((0, 2, 3)))


def test_folder(image_folder, tmp_path):
    loaded = data.load(f"folder:{image_folder}", tmp_path / "root")
    assert loaded.classes == ("bright", "dark")
    assert loaded.train.images.shape == (24, 3, 8, 8)
    assert loaded.val.labels.tolist() == [0] * 4 + [1] * 4
    pixels = np.asarray(Image.open(image_folder / "train" / "dark" / "0.png")).transpose(2, 0, 1)
    assert any(torch.equal(image, torch.from_numpy(pixels.copy())) for image in loaded.train.images)


def test_folder_is_decoded_once(image_folder, tmp_path, monkeypatch):
    first = data.load(f"folder:{image_folder}", tmp_path / "root")
    monkeypatch.setattr(data, "_open", lambda file: pytest.fail(f"decoded {file} again"))
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
    decode, name, root = data._decode, f"folder:{image_folder}", tmp_path / "root"

    def beaten(*arguments):
        decode(*arguments)
        if arguments[-1].name == "val.npy":
            monkeypatch.setattr(data, "_decode", decode)
            data.load(name, root)  # the other process, done first

    monkeypatch.setattr(data, "_decode", beaten)
    assert data.load(name, root).train.images.shape == (24, 3, 8, 8)
    assert len(list((root / "cache").iterdir())) == 1


def test_coarse_labels(image_folder, tmp_path):
    (image_folder / "coarse.json").write_text(json.dumps({"fine_to_coarse": {"dark": "any", "bright": "any"}}))
    loaded = data.load(f"folder:{image_folder}@coarse", tmp_path / "root")
    assert loaded.classes == ("any",)
    assert loaded.train.labels.unique().tolist() == [0]


def test_cifar100_table_groups_by_five():
    assert len(COARSE_CLASSES) == 20
    assert sorted(COARSE_OF_FINE) == sorted(list(range(20)) * 5)


def write_cifar100(root):
    """A valid CIFAR-100 archive as torchvision reads it, of 100 + 100 tiny-valued images, checksums aside."""
    import pickle

    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        entry = {"data": np.zeros((100, 3072), np.uint8), "fine_labels": list(range(100))}
        (folder / part).write_bytes(pickle.dumps(entry))
    names = [f"class{i}" for i in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names, "coarse_label_names": []}))


def test_cifar100_and_its_coarse_labels(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR100

    write_cifar100(tmp_path)
    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a: True)
    fine, coarse = (data.load(name, tmp_path) for name in ("cifar100", "cifar100-coarse"))
    assert fine.train.images.shape == (100, 3, 32, 32)
    assert fine.train.labels.tolist() == list(range(100))
    assert coarse.train.labels.tolist() == list(COARSE_OF_FINE)
    assert coarse.classes == COARSE_CLASSES


def refused(name, root, match, **options):
    with pytest.raises(InputError, match=match):
        data.load(name, root, **options)
    cache = root / "cache"
    assert not cache.exists() or not list(cache.iterdir())  # nothing half-written


def test_unknown_name(tmp_path):
    refused("cifar", tmp_path, "unknown data set 'cifar'.*did you mean 'cifar10'")


def test_no_network(tmp_path, monkeypatch):
    def no_network(*a, **k):
        raise OSError("no route")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    refused("cifar10", tmp_path, r"cifar10 is not in .* \(no route\); put cifar-10-python.tar.gz there, or pass")


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


def test_torchvision_built_for_another_torch(tmp_path, monkeypatch):
    original = builtins.__import__

    def broken(name, *args, **kwargs):
        if name.startswith("torchvision"):
            raise RuntimeError("operator torchvision::nms does not exist")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    refused(
        "cifar10", tmp_path, r"not built for each other .*torchvision::nms.*pip install --force-reinstall 'torch[=>]="
    )


def test_image_side_below_one(tmp_path):
    refused("digits", tmp_path, "image 0 is too small", image=0)
