"""Data sets by name, as uint8 tensors: digits, MNIST and CIFAR through torchvision, and any folder of images."""

import gzip
import hashlib
import importlib.metadata
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core import process, sizes
from core.data import folders
from core.data.cifar100 import COARSE_CLASSES, COARSE_OF_FINE
from core.data.splits import FIFTHS, Data, Split, outlined, statistics
from core.errors import InputError, choose, said, within

NAMES = (
    *("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "cifar100-coarse"),
    *("folder:PATH", "folder:PATH@coarse", "plugin:NAME"),
)
MOST = 1 << 14  # pixels a side
PLUGGED: dict[str, Callable[[], Any]] = {}  # by name, see core.plugins
DEBIAN = Path("/usr/share/datasets")  # of its packages dataset-fashion-mnist, …

_GREY = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}  # torchvision's names; one channel
_SIZES = {"digits": (24, (1437, 360)), **dict.fromkeys(_GREY, (28, (60_000, 10_000)))}
_IDX = ("images-idx3", "labels-idx1")
_PIECE = 1 << 26  # bytes


def load(name: str, root: str | Path = "data", image: int | None = None) -> Data:
    """The data set of this name (see NAMES), resized to `image` pixels a side if given.

    root: where downloads and caches are kept. Raises InputError for whatever the user can mend.
    """
    _check(name, image)
    if name.startswith("folder:"):
        return folders.load(name, Path(root), image)
    if name.startswith("plugin:"):
        return _plugged(name, image)
    splits = outline(name, root, image)
    size = sum(split.images.numel() for split in (splits.train, splits.val))
    instead = "pass a smaller --image, or a folder of images, which stays on disk"
    sizes.need(size, f"{name} at {splits.image} pixels", instead)
    if name in _GREY:
        return _mnist(name, Path(root), image)
    return _digits(image or 24) if name == "digits" else _cifar(name, Path(root), image)


def outline(name: str, root: str | Path = "data", image: int | None = None) -> Data:
    """The data set of this name with one black pixel as all of its images (which take no memory), where their
    number is known beforehand; a folder is loaded."""
    _check(name, image)
    if name.startswith(("folder:", "plugin:")):
        return load(name, root, image)
    classes = {"cifar100": 100, "cifar100-coarse": 20}.get(name, 10)
    own, counts = _SIZES.get(name, (32, (50_000, 10_000)))
    channels, mirrors = 1 if name in _GREY else 3, name not in ("digits", "mnist")
    return outlined(name, image or own, channels, tuple(map(str, range(classes))), counts, mirrors)


def _check(name: str, image: int | None) -> None:
    if image is not None:
        within("image", image, 1, MOST)
    if name.startswith("plugin:"):
        choose("data set", name, [f"plugin:{other}" for other in PLUGGED] or ["plugin:NAME, after --plugin FILE"])
    elif not name.startswith("folder:"):
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
    """The 1,797 handwritten digits of the UCI test set (8x8 grey) that scikit-learn carries, in stratified fifths."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import StratifiedKFold, train_test_split

    digits = load_digits()
    grey = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)
    images = _resize(grey[:, None], image).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(digits.target).long()
    order = np.arange(len(labels))
    train, val = train_test_split(order, test_size=1 / FIFTHS, random_state=0, stratify=digits.target)
    fifth = torch.zeros(len(order), dtype=torch.int64)
    folds = StratifiedKFold(FIFTHS - 1, shuffle=True, random_state=0).split(train, digits.target[train])
    for i, (_, part) in enumerate(folds, start=1):
        fifth[part] = i
    splits = [Split(images[index], labels[index]) for index in map(torch.from_numpy, (train, val))]
    return replace(_described("digits", splits[0], splits[1], [str(i) for i in range(10)], False), fifth=fifth)


def _mnist(name: str, root: Path, image: int | None) -> Data:
    """The files as they are published (IDX), of Debian's package, or of torchvision's folder and download."""
    datasets = _torchvision_datasets()
    kind = getattr(datasets, _GREY[name])
    raw = root / _GREY[name] / "raw"
    folders = [root / name, root, raw, DEBIAN / name]
    here = next((f for f in folders if (f / "t10k-labels-idx1-ubyte.gz").is_file()), None)
    if here is None:
        try:
            with _fetching(raw):
                kind(str(root), download=True)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{name} is not in '{root}' and could not be downloaded ({error}); put its four .gz files into "
                f"'{root / name}' (Debian's package dataset-{name} has them), or pass --data digits"
            ) from error
        here = raw
    for other in set(_GREY) - {name}:  # whose files have the same names
        if _md5(here / "train-images-idx3-ubyte.gz") in dict(getattr(datasets, _GREY[other]).resources).values():
            raise InputError(f"'{here}' has the files of {other}; put those of {name} into '{root / name}'")

    def split(part: str) -> Split:
        images, labels = (_idx(here / f"{part}-{what}-ubyte.gz", int(what[-1])) for what in _IDX)
        return Split(_resize(images[:, None], image), labels.long())

    return _described(name, split("train"), split("t10k"), [str(c) for c in kind.classes], name != "mnist")


@contextmanager
def _fetching(folder: Path) -> Iterator[None]:
    """Within, a folder is filled; of what is not, the folders that this made are gone."""
    made = [at for at in (folder, *folder.parents) if not at.exists()]
    try:
        yield
    except BaseException:
        for at in made:
            with suppress(OSError):
                at.rmdir()
        raise


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else ""


def _idx(path: Path, axes: int) -> Tensor:
    """The bytes of an IDX file in their shape: two zeros, type, number of axes, then each axis and the values
    (big-endian; yann.lecun.com/exdb/mnist). axes: how many there have to be, after the first alike."""
    try:
        if not path.is_file():
            raise OSError("it is no regular file")
        content = gzip.decompress(path.read_bytes())
        shape = np.frombuffer(content, ">i4", content[3], 4)
        if content[:4] != bytes([0, 0, 8, axes]) or min(shape) < 0 or len({*shape[1:]}) > 1:
            raise ValueError(f"{' x '.join(map(str, shape))} values, not bytes of square images or of labels")
        return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape).copy())
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise InputError(f"'{path}' cannot be read ({error}); remove it, or fetch it again") from error


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
        with _fetching(root):
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


@process.as_it_was()
def _plugged(name: str, image: int | None) -> Data:
    """(train, val, class names) of a plugin's function, each split uint8 images [N,C,S,S] and int64 labels [N]."""
    try:
        train, val, classes = PLUGGED[name.removeprefix("plugin:")]()
        splits = [Split(*(torch.as_tensor(part).to_dense().cpu() for part in split)) for split in (train, val)]
        names = [str(c) for c in classes]
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise InputError(f"data '{name}' raises {said(error)}; {_WANTED}") from error
    for images, labels in splits:
        shaped = images.dim() == 4 and images.shape[-2] == images.shape[-1] and images.shape[1] == splits[0][0].shape[1]
        if not shaped or images.dtype != torch.uint8 or not images.numel():
            raise InputError(f"data '{name}' has images of {images.dtype} {list(images.shape)}; {_WANTED}")
        right = labels.dtype == torch.int64 and labels.shape == images.shape[:1]
        if not right or not 0 <= int(labels.min()) <= int(labels.max()) < len(names):
            raise InputError(f"data '{name}' has labels of {labels.dtype} {list(labels.shape)}; {_WANTED}")
    if len({*names}) < max(2, len(names)):
        raise InputError(f"data '{name}' has the classes {', '.join(names[:5])}; it needs two or more, each once")
    train, val = (Split(_resize(split.images, image or splits[0].images.shape[-1]), split.labels) for split in splits)
    return _described(name, train, val, names)


_WANTED = (
    "its function returns (train, val, class names), each split uint8 images [N,C,S,S] and int64 labels [N], below the "
    "number of classes"
)


def _described(name: str, train: Split, val: Split, classes: Sequence[str], mirrors: bool = True) -> Data:
    for images, labels in (train, val):
        if len(images) != len(labels) or not len(labels) or not 0 <= labels.min() <= labels.max() < len(classes):
            raise InputError(
                f"{name} has {len(images):,} images, {len(labels):,} labels and {len(classes)} classes, which do not "
                "belong together; remove its files, or fetch them again"
            )
    if torch.equal(train.images, val.images):
        raise InputError(f"data '{name}' has the same images to learn and to judge by: a copy; hold out others")
    return Data(name, train, val, tuple(classes), *statistics(train.images), mirrors)
