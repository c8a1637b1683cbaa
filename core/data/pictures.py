"""Image files as uint8 RGB, decoded as they are meant to be seen, or refused by name."""

import os
import stat
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import InputError

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".avif"),
    *(".jp2", ".heic", ".heif"),  # for the last two Pillow needs a plugin, and says that it has none
)


def native(file: str) -> int:
    """The side in pixels of a square picture; InputError for another."""
    width, height = _open(file).size
    if width != height:
        raise InputError(f"'{file}' is {width}x{height}, not square; pass --image N to resize and crop every image")
    return int(width)


def decode(files: Sequence[str], side: int, exact: bool, out: Path) -> None:
    """Write uint8 [N,3,side,side]: shorter edge resized to `side`, centre cropped; `exact` refuses other sizes.

    InputError for a file that cannot be decoded, and for a disk without room, before anything is written to it: a
    memory map finds that out by a signal that ends the process.
    """
    from PIL import Image, ImageOps

    array = np.lib.format.open_memmap(out, mode="w+", dtype=np.uint8, shape=(len(files), 3, side, side))
    try:
        with out.open("r+b") as handle:
            os.posix_fallocate(handle.fileno(), 0, out.stat().st_size)
    except OSError as error:
        raise InputError(
            f"{len(files):,} images of {side}x{side} pixels take {array.nbytes / 2**20:,.0f} MiB, which '{out.parent}' "
            f"has no room for ({error.strerror}); free some, or pass --data-root DIR on another disk"
        ) from error

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

    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # of what is odd in a file that can be decoded
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for part in range(0, len(files), 4096):  # map() would queue every file of a large folder at once
            list(pool.map(one, range(part, min(part + 4096, len(files)))))
    array.flush()


def _open(file: str) -> Any:
    """The picture in a file, PIL's, in RGB and the right way up (EXIF), on white if it is transparent; 16 bits a pixel
    are scaled to 8."""
    from PIL import Image, ImageOps

    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise InputError("it is no regular file")
        with Image.open(file) as picture:
            frames = getattr(picture, "n_frames", 1)
            if frames > 1 and picture.format != "MPO":  # a camera's: the first is the picture
                raise InputError(f"it has {frames} frames; keep one")
            if picture.mode == "F":
                raise InputError("its pixels are floating-point numbers, whose range nothing tells; save 8 or 16 bits")
            upright = ImageOps.exif_transpose(picture)
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            return (Image.fromarray(_deep(upright)) if upright.mode.startswith("I") else upright).convert("RGB")
    except Exception as error:  # a damaged file can raise nearly anything from within a decoder
        raise InputError(f"'{file}' cannot be decoded as an image ({error}); repair, convert or remove it") from error


def _deep(picture: Any) -> NDArray[np.uint8]:
    """Of 16 bits a pixel, which convert() would clip to 8."""
    pixels = np.asarray(picture)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise InputError(f"its pixels are {pixels.min()} to {pixels.max()}, beyond 16 bits")
    return (pixels / 257).round().astype(np.uint8)
