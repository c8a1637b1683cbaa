"""Data sets by name, as uint8 tensors: digits, CIFAR through torchvision, and any folder of images."""

import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.data import folders
from core.data.cifar100 import COARSE_CLASSES, COARSE_OF_FINE
from core.data.splits import Data, Split, statistics
from core.errors import InputError, choose

NAMES = ("digits", "cifar10", "cifar100", "cifar100-coarse", "folder:PATH", "folder:PATH@coarse")

_PIECE = 1 << 26  # bytes


def load(name: str, root: str | Path = "data", image: int | None = None) -> Data:
    """The data set of this name (see NAMES), resized to `image` pixels a side if given.

    root: where downloads and caches are kept. Raises InputError for whatever the user can mend.
    """
    _check(name, image)
    if name.startswith("folder:"):
        return folders.load(name, Path(root), image)
    return _digits(image or 24) if name == "digits" else _cifar(name, Path(root), image)


def outline(name: str, root: str | Path = "data", image: int | None = None) -> Data:
    """The data set of this name with one black image as all of its images (no more memory than one has), where their
    number is known beforehand; a folder is loaded."""
    _check(name, image)
    if name.startswith("folder:"):
        return load(name, root, image)
    classes = {"cifar100": 100, "cifar100-coarse": 20}.get(name, 10)
    side, counts = (image or 24, (1437, 360)) if name == "digits" else (image or 32, (50_000, 10_000))
    pixel, label = torch.zeros(1, 3, side, side, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    train, val = (Split(pixel.expand(n, -1, -1, -1), label.expand(n)) for n in counts)
    return Data(name, train, val, tuple(map(str, range(classes))), (0.0,) * 3, (1.0,) * 3, name != "digits")


def _check(name: str, image: int | None) -> None:
    if image is not None and image < 1:
        raise InputError(f"image {image} is too small: at least 1 pixel")
    if not name.startswith("folder:"):
        choose("data set", name, NAMES)


def _resize(images: Tensor, side: int | None) -> Tensor:
    if side is None or side == images.shape[-1]:
        return images
    resized = images.new_empty((*images.shape[:2], side, side))
    count = max(1, _PIECE // (resized[0].numel() * 4))  # as float32
    for piece, target in zip(images.split(count), resized.split(count), strict=True):
        pixels = F.interpolate(piece.float(), (side, side), mode="bilinear", align_corners=False, antialias=True)
        target.copy_(pixels.round().clamp(0, 255))
    return resized


def _digits(image: int) -> Data:
    """The 1,797 handwritten digits of the UCI test set (8x8 grey) that scikit-learn carries; a fifth held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    grey = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)
    images = _resize(grey[:, None], image).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(digits.target).long()
    order = np.arange(len(labels))
    train, val = (
        torch.from_numpy(index)
        for index in train_test_split(order, test_size=0.2, random_state=0, stratify=digits.target)
    )
    classes = [str(i) for i in range(10)]
    return _described("digits", Split(images[train], labels[train]), Split(images[val], labels[val]), classes, False)


def _torchvision_datasets() -> Any:
    try:
        import torchvision.datasets
    except RuntimeError as error:
        installed = importlib.metadata.version("torchvision")
        needs = importlib.metadata.requires("torchvision") or []
        fitting = next((re.sub(r"[ ()]", "", need) for need in needs if re.match(r"torch\b", need)), "torch")
        raise InputError(
            f"torch {torch.__version__} and torchvision {installed} are not built for each other ({error}); install "
            f"both from one index: pip install --force-reinstall '{fitting}' torchvision=={installed.split('+')[0]}"
        ) from error
    return torchvision.datasets


def _cifar(name: str, root: Path, image: int | None) -> Data:
    datasets = _torchvision_datasets()
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    try:
        train, val = (kind(str(root), train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{name} is not in '{root}' and could not be downloaded ({error}); put {kind.filename} there, or pass "
            "--data-root DIR, --data folder:PATH or --data digits"
        ) from error

    def split(part: Any) -> Split:
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        labels = torch.tensor(part.targets)
        return Split(_resize(images, image), torch.tensor(COARSE_OF_FINE)[labels] if coarse else labels)

    coarse = name == "cifar100-coarse"
    return _described(name, split(train), split(val), COARSE_CLASSES if coarse else train.classes)


def _described(name: str, train: Split, val: Split, classes: Sequence[str], mirrors: bool = True) -> Data:
    return Data(name, train, val, tuple(classes), *statistics(train.images), mirrors)
