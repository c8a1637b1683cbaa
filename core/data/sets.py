"""Data sets as uint8 tensors: digits, CIFAR through torchvision, and any folder of images.

Images are decoded once, into a memory-mapped cache, and live on the device while they fit there.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.data.cifar100 import COARSE_CLASSES, COARSE_OF_FINE
from core.errors import InputError, choose

NAMES = ("digits", "cifar10", "cifar100", "cifar100-coarse", "folder:PATH", "folder:PATH@coarse")

_CACHE_FORMAT = 2
_PIECE = 1 << 26  # bytes


class Split(NamedTuple):
    """images uint8 [N,C,S,S], labels int64 [N]."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Data:
    """A data set: its splits, class names in label order, and the training images' mean and deviation per
    channel (of pixels in [0, 1]). mirrors: whether a mirrored image keeps its class."""

    name: str
    train: Split
    val: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mirrors: bool = True

    @property
    def image(self) -> int:
        """Side in pixels."""
        return self.train.images.shape[-1]

    def to(self, device: torch.device) -> "Data":
        """On the device if the images take at most half of its free memory, else unchanged."""
        size = sum(split.images.nbytes for split in (self.train, self.val))
        if device.type == "cuda" and size > torch.cuda.mem_get_info(device)[0] / 2:
            return self
        train, val = (Split(*(t.to(device) for t in split)) for split in (self.train, self.val))
        return replace(self, train=train, val=val)


def load(name: str, root: str | Path = "data", image: int | None = None) -> Data:
    """The data set of this name (see NAMES), resized to `image` pixels a side if given.

    root: where downloads and caches are kept. Raises InputError for whatever the user can mend.
    """
    _check(name, image)
    if name.startswith("folder:"):
        return _folder(name, Path(root), image)
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


def statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 images [N,C,S,S], as fractions of 255, exact; a piece of the
    images at a time, so that a memory map needs no more memory than that."""
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for piece in images.split(max(1, _PIECE // max(1, images[0].numel()))):
        counts += torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in piece.unbind(1)])
    weights, levels = counts / counts.sum(1, keepdim=True).double(), torch.arange(256).double() / 255
    mean = weights @ levels
    variance = weights @ levels.square() - mean.square()
    return tuple(mean.tolist()), tuple(variance.clamp_min(1e-12).sqrt().tolist())


def _build(
    name: str,
    train: Split,
    val: Split,
    classes: Sequence[str],
    mirrors: bool = True,
    known: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> Data:
    mean, std = known or statistics(train.images)
    return Data(name, train, val, tuple(classes), mean, std, mirrors)


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
    return _build("digits", Split(images[train], labels[train]), Split(images[val], labels[val]), classes, False)


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
    return _build(name, split(train), split(val), COARSE_CLASSES if coarse else train.classes)


def _folder(name: str, root: Path, image: int | None) -> Data:
    coarse = name.endswith("@coarse")
    path = Path(name.removeprefix("folder:").removesuffix("@coarse")).expanduser()
    if not path.is_dir():
        raise InputError(f"folder '{path}' does not exist; pass --data folder:PATH with train/ and val/ or test/ in it")
    held_out = next((path / part for part in ("val", "test") if (path / part).is_dir()), None)
    if not (path / "train").is_dir() or held_out is None:
        raise InputError(f"'{path}' needs a folder train/ and one of val/, test/, with one folder a class in each")
    classes, train = _listing(path / "train")
    other, val = _listing(held_out)
    if classes != other:
        odd = sorted(set(classes) ^ set(other))
        raise InputError(
            f"'{path}': train/ and {held_out.name}/ have different classes; in one of them only: {', '.join(odd[:5])}"
        )
    index = list(range(len(classes)))
    names = classes
    if coarse:
        names, index = _coarse(path, classes)
    *images, known = _cached(path, [file for file, _ in train], [file for file, _ in val], root, image)
    parts = [
        Split(pixels, torch.tensor([index[label] for _, label in samples]))
        for pixels, samples in zip(images, (train, val), strict=True)
    ]
    return _build(name, parts[0], parts[1], names, known=known)


def _listing(path: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """Sorted class names and (file, label) pairs of one ImageFolder tree."""
    folder = _torchvision_datasets().folder
    try:
        classes, labels = folder.find_classes(str(path))
    except FileNotFoundError as error:
        raise InputError(f"'{path}' is empty: it needs one folder of images a class") from error
    samples = folder.make_dataset(str(path), labels, folder.IMG_EXTENSIONS, allow_empty=True)
    used = {label for _, label in samples}
    missing = [c for c in classes if labels[c] not in used]
    if missing:
        raise InputError(
            f"'{path}': no images in class {', '.join(missing[:5])}; "
            f"file names must end in {', '.join(folder.IMG_EXTENSIONS)}"
        )
    return classes, samples


def _coarse(path: Path, classes: list[str]) -> tuple[list[str], list[int]]:
    """Coarse class names and the coarse label of each fine one, from coarse.json."""
    table = path / "coarse.json"
    if not table.is_file():
        raise InputError(f"'{table}' does not exist: @coarse needs it (fine_to_coarse: names of the coarse classes)")
    try:
        coarse_of = json.loads(table.read_text())["fine_to_coarse"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"'{table}' has no readable fine_to_coarse table ({error!r})") from error
    if not isinstance(coarse_of, dict) or not all(isinstance(name, str) for name in coarse_of.values()):
        raise InputError(f"'{table}': fine_to_coarse must give each class the name of its coarse class")
    missing = [c for c in classes if c not in coarse_of]
    if missing:
        raise InputError(f"'{table}': no coarse class for {', '.join(missing[:5])}")
    names = sorted({coarse_of[c] for c in classes})
    return names, [names.index(coarse_of[c]) for c in classes]


def _cached(
    path: Path, train: list[str], val: list[str], root: Path, image: int | None
) -> tuple[Tensor, Tensor, tuple[tuple[float, ...], tuple[float, ...]]]:
    """Decoded images of both splits and the training images' statistics, from the cache; a change to any file, or to
    the size, makes a new one."""
    try:
        listing = [(file, (stat := os.stat(file)).st_size, stat.st_mtime_ns) for file in train + val]
    except OSError as error:
        raise InputError(f"'{error.filename}' cannot be read ({error.strerror}); repair or remove it") from error
    digest = hashlib.sha256(repr((_CACHE_FORMAT, str(path.resolve()), image, listing)).encode()).hexdigest()[:16]
    folder = root / "cache" / f"{path.resolve().name}-{digest}"
    if not folder.is_dir():
        (root / "cache").mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=root / "cache", prefix=".decoding-"))
        try:
            side = image or _native(train[0])
            _decode(train, side, image is None, temporary / "train.npy")
            _decode(val, side, image is None, temporary / "val.npy")
            (temporary / "statistics.json").write_text(json.dumps(statistics(_mapped(temporary / "train.npy"))))
            if not folder.is_dir():  # another process may have finished first
                temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    mean, std = json.loads((folder / "statistics.json").read_text())
    return _mapped(folder / "train.npy"), _mapped(folder / "val.npy"), (tuple(mean), tuple(std))


def _mapped(path: Path) -> Tensor:
    """Images on disk, read when they are used."""
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _native(file: str) -> int:
    width, height = _open(file).size
    if width != height:
        raise InputError(f"'{file}' is {width}x{height}, not square; pass --image N to resize and crop every image")
    return width


def _open(file: str) -> Any:
    from PIL import Image

    try:
        with Image.open(file) as picture:
            if picture.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip to 8
                return Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8)).convert("RGB")
            return picture.convert("RGB")
    except Exception as error:  # a damaged file can raise nearly anything from within a decoder
        raise InputError(f"'{file}' cannot be decoded as an image ({error}); repair or remove it") from error


def _decode(files: list[str], side: int, exact: bool, out: Path) -> None:
    """Write uint8 [N,3,side,side]: shorter edge resized to `side`, centre cropped; `exact` refuses other sizes."""
    from PIL import Image, ImageOps

    array = np.lib.format.open_memmap(out, mode="w+", dtype=np.uint8, shape=(len(files), 3, side, side))

    def one(i: int) -> None:
        picture = _open(files[i])
        if picture.size != (side, side):
            if exact:
                width, height = picture.size
                raise InputError(
                    f"'{files[i]}' is {width}x{height}, others {side}x{side}; pass --image N to resize every image"
                )
            picture = ImageOps.fit(picture, (side, side), Image.Resampling.BILINEAR)
        array[i] = np.asarray(picture).transpose(2, 0, 1)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for part in range(0, len(files), 4096):  # map() would queue every file of a large folder at once
            list(pool.map(one, range(part, min(part + 4096, len(files)))))
    array.flush()
