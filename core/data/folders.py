"""A folder of images, train/ and val/ or test/ with one folder a class in each, decoded once into a memory-mapped
cache."""

import hashlib
import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.data.splits import Data, Split, Statistics, statistics
from core.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

_CACHE_FORMAT = 2


def load(name: str, root: Path, image: int | None) -> Data:
    """The data set "folder:PATH", or "folder:PATH@coarse" with the classes of its coarse.json; caches below `root`."""
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
    return Data(name, parts[0], parts[1], tuple(names), *known)


def _listing(path: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """Sorted class names and (file, label) pairs, in order of class and name."""
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    if not classes:
        raise InputError(f"'{path}' is empty: it needs one folder of images a class")
    files = [_images(path / c) for c in classes]
    if missing := [c for c, of_class in zip(classes, files, strict=True) if not of_class]:
        raise InputError(
            f"'{path}': no images in class {', '.join(missing[:5])}; file names must end in {', '.join(EXTENSIONS)}"
        )
    return classes, [(file, label) for label, of_class in enumerate(files) for file in of_class]


def _images(folder: Path) -> list[str]:
    found = sorted(os.walk(folder, followlinks=True))
    return [os.path.join(at, name) for at, _, names in found for name in sorted(names) if _is_image(name)]


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


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
) -> tuple[Tensor, Tensor, Statistics]:
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
