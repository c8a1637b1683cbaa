import builtins

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
    refused("digits", tmp_path, "image 0 is too small", image=0)
