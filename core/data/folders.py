"""A folder of images, train/ and val/ or test/ with one folder a class in each."""

import json
import os
import unicodedata
from pathlib import Path
from typing import NoReturn

import torch

from core.data.cache import cached
from core.data.pictures import EXTENSIONS
from core.data.splits import Data, Split
from core.errors import InputError


def load(name: str, root: Path, image: int | None) -> Data:
    """The data set "folder:PATH", or "folder:PATH@coarse" with the classes of its coarse.json; caches below `root`."""
    coarse = name.endswith("@coarse")
    given = name.removeprefix("folder:").removesuffix("@coarse")
    if not given:
        raise InputError(f"data '{name}' names no folder; write folder:PATH, folder:. for this one")
    path = Path(os.path.expanduser(given))
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"folder '{path}' has a name that is no text (UTF-8); rename it, or link to it") from error
    if not path.is_dir():
        what = "is no folder" if path.exists() else "does not exist"
        raise InputError(f"folder '{path}' {what}; pass --data folder:PATH with train/ and val/ or test/ in it")
    held_out = next((path / part for part in ("val", "test") if (path / part).is_dir()), None)
    if not (path / "train").is_dir() or held_out is None:
        raise InputError(f"'{path}' needs a folder train/ and one of val/, test/, with one folder a class in each")
    classes, train = _listing(path / "train")
    other, val = _listing(held_out)
    if classes != other:
        odd = sorted(set(classes) ^ set(other))
        alike = len({unicodedata.normalize("NFC", c) for c in odd}) < len(odd)  # letters that only look the same
        told = ", ".join(map(ascii if alike else repr, odd[:5]))
        raise InputError(f"'{path}': train/ and {held_out.name}/ have different classes; in one of them only: {told}")
    index = list(range(len(classes)))
    names = classes
    if coarse:
        names, index = _coarse(path, classes)
    if len(names) < 2:
        raise InputError(f"'{path}' has one class ({names[0]}): nothing to tell apart; it needs two folders or more")
    files = [[file for file, _ in samples] for samples in (train, val)]
    found = cached(path, files, _states(path, *files), root, image)
    train_split, val_split = (
        Split(images, torch.tensor([index[label] for _, label in samples]))
        for images, samples in zip(found[:2], (train, val), strict=True)
    )
    note = _copied([(file, index[label]) for file, label in train + val], len(train), found.copies)
    return Data(name, train_split, val_split, tuple(names), *found.known, pixels=found.digests, note=note)


def _copied(samples: list[tuple[str, int]], learned: int, copies: list[tuple[int, int]]) -> str:
    """What is told of validation images that are training images too, and of one image in two classes. learned: how
    many of the files and their labels are trained on."""
    notes = []
    if judged := [(i, j) for i, j in copies if j < learned <= i]:
        i, j = judged[0]
        notes.append(
            f"{len(judged):,} of the {len(samples) - learned:,} validation images are learned, too, such as "
            f"'{samples[i][0]}', which is '{samples[j][0]}': accuracy is told too high; hold out others"
        )
    if odd := [(i, j) for i, j in copies if samples[i][1] != samples[j][1]]:
        i, j = odd[0]
        notes.append(
            f"{len(odd):,} images are in two classes, such as '{samples[i][0]}', which is '{samples[j][0]}': one of "
            "the labels is wrong"
        )
    return "; ".join(notes)


def _states(path: Path, train: list[str], val: list[str]) -> list[tuple[str | int, ...]]:
    """Of every image the file, its number on the disk, size, and times of the last change: those out of an archive may
    all have one size and time, and two of them, or their folders, change places. InputError for one that is twice among
    them, by links: it would be of two classes, count twice, or be learned before it is judged."""
    seen: dict[tuple[int, int], str] = {}
    states: list[tuple[str | int, ...]] = []
    for file in train + val:
        try:
            stat = os.stat(file)
        except OSError as error:
            _unreadable(error)
        other = seen.setdefault((stat.st_dev, stat.st_ino), file)
        if other != file:
            raise InputError(f"'{path}': '{file}' and '{other}' are one file, by a link; keep one of them")
        states.append((file, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return states


def _listing(path: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """Sorted class names and (file, label) pairs, in order of class and name."""
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    if not classes:
        raise InputError(f"'{path}' is empty: it needs one folder of images a class")
    if stray := sorted(e.name for e in path.iterdir() if not e.is_dir() and (e.is_symlink() or _is_image(e.name))):
        raise InputError(
            f"'{path / stray[0]}', {len(stray):,} in all, is in no class: an image beside their folders, or a link to "
            "nothing; move or remove it"
        )
    files = [_images(path / c) for c in classes]
    if missing := [c for c, of_class in zip(classes, files, strict=True) if not of_class]:
        raise InputError(
            f"'{path}': no images in class {', '.join(missing[:5])}; file names must end in {', '.join(EXTENSIONS)}"
        )
    return classes, [(file, label) for label, of_class in enumerate(files) for file in of_class]


def _images(folder: Path) -> list[str]:
    """The image files below a folder, sorted; links to folders are followed, each folder once. What is hidden there, or
    a file server's thumbnails, are copies that nobody put there to be learned."""
    found, seen = [], set()
    for at, below, names in os.walk(folder, onerror=_unreadable, followlinks=True):
        stat = os.stat(at)
        if (stat.st_dev, stat.st_ino) in seen:
            below.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        below[:] = [name for name in below if not name.startswith((".", "@eaDir"))]
        found += [os.path.join(at, name) for name in names if _is_image(name)]
    return sorted(found)


def _unreadable(error: OSError) -> NoReturn:
    raise InputError(f"'{error.filename}' cannot be read ({error.strerror}); repair or remove it") from error


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _coarse(path: Path, classes: list[str]) -> tuple[list[str], list[int]]:
    """Coarse class names and the coarse label of each fine one, from coarse.json."""
    table = path / "coarse.json"
    if not table.is_file():
        raise InputError(f"'{table}' does not exist: @coarse needs it (fine_to_coarse: names of the coarse classes)")
    try:
        coarse_of = json.loads(table.read_bytes())["fine_to_coarse"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"'{table}' has no readable fine_to_coarse table ({error!r})") from error
    if not isinstance(coarse_of, dict) or not all(isinstance(name, str) for name in coarse_of.values()):
        raise InputError(f"'{table}': fine_to_coarse must give each class the name of its coarse class")
    missing = [c for c in classes if c not in coarse_of]
    if missing:
        raise InputError(f"'{table}': no coarse class for {', '.join(missing[:5])}")
    names = sorted({coarse_of[c] for c in classes})
    return names, [names.index(coarse_of[c]) for c in classes]
