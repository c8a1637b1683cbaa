import builtins
import gzip
import hashlib
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from core.data import sets as data
from core.data.cifar100 import COARSE_CLASSES, COARSE_OF_FINE
from core.data.splits import statistics
from core.errors import InputError


def refused(name, root, match, **options):
    with pytest.raises(InputError, match=match):
        data.load(name, root, **options)
    cache = root / "cache"
    assert not cache.exists() or not list(cache.iterdir())  # nothing half-written


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


@pytest.mark.parametrize(
    ("kind", "shape"), [(8, (4,)), (8, (4, 28, 20)), (8, (4, 28, 28, 1)), (8, (-1, 28, 28)), (9, (4, 8, 8))]
)
def test_an_idx_file_of_something_else_is_one_message(tmp_path, idx, kind, shape):
    idx(tmp_path / "root")
    content = struct.pack(f">HBB{len(shape)}i", 0, kind, len(shape), *shape) + bytes(abs(int(np.prod(shape))))
    (tmp_path / "root" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
    with pytest.raises(InputError, match="train-images-idx3-ubyte.gz' cannot be read .* not bytes of square images"):
        data.load("fashion-mnist", tmp_path / "root", image=8)


def test_what_is_learned_is_not_what_is_judged(tmp_path, idx):
    idx(tmp_path / "root")
    for what in ("images-idx3", "labels-idx1"):
        shutil.copy(*(tmp_path / "root" / f"{part}-{what}-ubyte.gz" for part in ("train", "t10k")))
    with pytest.raises(InputError, match="data 'fashion-mnist' has the same images to learn and to judge by"):
        data.load("fashion-mnist", tmp_path / "root")


@pytest.mark.parametrize("labels", [[0], [0, 1, 2], [0, 10], []])
def test_labels_that_are_not_of_the_images_are_one_message(tmp_path, idx, labels):
    idx(tmp_path / "root")
    file = tmp_path / "root" / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(gzip.compress(struct.pack(">HBBI", 0, 8, 1, len(labels)) + bytes(labels)))
    with pytest.raises(InputError, match=rf"2 images, {len(labels)} labels and 10 classes, which do not belong"):
        data.load("fashion-mnist", tmp_path / "root")


@pytest.mark.parametrize(
    ("name", "kind", "makes", "instead"),
    [("mnist", "MNIST", "MNIST/raw", "put its four .gz files into"), ("cifar10", "CIFAR10", "", "put it there")],
)
def test_what_cannot_be_fetched_is_one_message(tmp_path, monkeypatch, idx, name, kind, makes, instead):
    class Offline:
        filename = "it"

        def __init__(self, root, **options):
            Path(root, makes).mkdir(parents=True)
            raise RuntimeError("no network")

    monkeypatch.setattr(data._torchvision_datasets(), kind, Offline)
    with pytest.raises(InputError, match=rf"could not be downloaded \(no network\); {instead}"):
        data.load(name, tmp_path / "new" / "root")
    assert not [*tmp_path.iterdir()]


def test_files_of_the_other_set_are_not_taken_for_it(tmp_path, monkeypatch, idx):
    """They have the same names."""
    idx(root := tmp_path / "root")
    of = hashlib.md5((root / "train-images-idx3-ubyte.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(data._torchvision_datasets().FashionMNIST, "resources", [("train-images-idx3-ubyte.gz", of)])
    assert data.load("fashion-mnist", root).classes[0] == "T-shirt/top"
    with pytest.raises(InputError, match=r"' has the files of fashion-mnist; put those of mnist into '.*/mnist'$"):
        data.load("mnist", root)


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
    mean, std = statistics(images)
    assert mean == pytest.approx((images.numpy() / 255).mean((0, 2, 3)))
    assert std == pytest.approx((images.numpy() / 255).std((0, 2, 3)))


def test_cifar100_table_groups_by_five():
    assert len(COARSE_CLASSES) == 20
    assert sorted(COARSE_OF_FINE) == sorted(list(range(20)) * 5)


def write_cifar100(root):
    """A valid CIFAR-100 archive as torchvision reads it, of 100 + 100 tiny-valued images, checksums aside."""
    import pickle

    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        entry = {"data": np.full((100, 3072), part == "test", np.uint8), "fine_labels": list(range(100))}
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


def test_unknown_name(tmp_path):
    refused("cifar", tmp_path, "unknown data set 'cifar'.*did you mean 'cifar10'")


def test_no_network(tmp_path, monkeypatch):
    def no_network(*a, **k):
        raise OSError("no route")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    refused("cifar10", tmp_path, r"cifar10 is not in .* \(no route\); put cifar-10-python.tar.gz there, or pass")


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
    refused("digits", tmp_path, "image 0 is outside 1 to 16,384", image=0)
