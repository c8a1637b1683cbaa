"""What a data set is: splits of uint8 images, class names, and the statistics of its pixels."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from core import files

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation per channel

FIFTHS = 5
_PIECE = 1 << 26  # bytes


class Split(NamedTuple):
    """images uint8 [N,C,S,S], labels int64 [N]."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Data:
    """A data set: its splits, class names in label order, and the training images' mean and deviation per
    channel (of pixels in [0, 1]). mirrors: whether a mirrored image keeps its class. fifth: where seeds hold out
    different images, the fifth of every training and then validation image [N]. pixels: the digests of the splits'
    images, where these are known already. note: what whoever uses it should know."""

    name: str
    train: Split
    val: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mirrors: bool = True
    fifth: Tensor | None = None
    pixels: tuple[str, str] | None = None
    note: str = ""

    def digest(self) -> str:
        """SHA-256 of all images, labels and class names, and of how seeds divide them."""
        splits = self.train, self.val
        pixels = self.pixels or [files.digest(split.images) for split in splits]
        parts = None if self.fifth is None else files.digest(self.fifth)
        whole = [*pixels, *(files.digest(split.labels) for split in splits), self.classes, parts]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()

    @property
    def parts(self) -> int:
        """Into how many the seeds divide the images, to hold out one each; 1 where all hold out the same."""
        return 1 if self.fifth is None else FIFTHS

    def held_out(self, seed: int) -> int | None:
        """The part that a seed holds out; None where there is one."""
        return held_out(seed, self.parts)

    def holding_out(self, seed: int) -> "Data":
        """As the seed divides it: five in a row hold out every image once. Mean and deviation stay."""
        if self.fifth is None:
            return self
        order = torch.cat([(self.fifth != seed % FIFTHS).nonzero(), (self.fifth == seed % FIFTHS).nonzero()])[:, 0]
        count = int((self.fifth != seed % FIFTHS).sum())
        images, labels = (torch.cat(pair)[order.to(pair[0].device)] for pair in zip(self.train, self.val, strict=True))
        train, val = Split(images[:count], labels[:count]), Split(images[count:], labels[count:])
        return replace(self, train=train, val=val, fifth=self.fifth[order])

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


def held_out(seed: int, parts: int) -> int | None:
    """Which of so many parts of the images a seed holds out; None where there is one."""
    return None if parts == 1 else seed % parts


def outlined(
    name: str, image: int, channels: int, classes: Sequence[str], counts: tuple[int, int], mirrors: bool = True
) -> Data:
    """A data set with one black pixel as all of its images, which take no memory. counts: how many are trained on and
    validated by."""
    pixel = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(-1, channels, image, image)
    label = torch.zeros(1, dtype=torch.int64)
    train, val = (Split(pixel.expand(n, -1, -1, -1), label.expand(n)) for n in counts)
    return Data(name, train, val, tuple(classes), (0.0,) * channels, (1.0,) * channels, mirrors)


def statistics(images: Tensor) -> Statistics:
    """Mean and standard deviation per channel of uint8 images [N,C,S,S], as fractions of 255, exact; a piece of the
    images at a time, so that a memory map needs no more memory than that."""
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for piece in images.split(max(1, _PIECE // max(1, images[0].numel()))):
        counts += torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in piece.unbind(1)])
    weights, levels = counts / counts.sum(1, keepdim=True).double(), torch.arange(256).double() / 255
    mean = weights @ levels
    variance = weights @ levels.square() - mean.square()
    return tuple(mean.tolist()), tuple(variance.clamp_min(1e-12).sqrt().tolist())
