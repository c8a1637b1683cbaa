"""What a model is to say of a batch: the labels, smoothed, or those of two images that are mixed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from core import rng
from core.errors import InputError


@dataclass(frozen=True)
class Targets:
    """mixup: alpha of Beta(alpha, alpha), from which a batch's share of each image in its mixture is drawn (Zhang et
    al., ICLR 2018, arXiv 1710.09412); 0: no image is mixed. smoothing: the share of a target that all classes have
    equally (Szegedy et al., CVPR 2016, arXiv 1512.00567).

    Raises InputError for a mixup that is negative or not finite, and a smoothing outside [0, 1).
    """

    mixup: float = 0.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.mixup < float("inf"):
            raise InputError(f"mixup {self.mixup} must be finite and 0 or above: write for example 0.8")
        if not 0 <= self.smoothing < 1:
            raise InputError(f"smoothing {self.smoothing} is outside 0 to below 1: write for example 0.1")

    def __call__(self, images: Tensor, labels: Tensor, key: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Images [B,C,H,W] and labels [B] -> the images to learn from, and the cross entropy as a function of logits.

        Each image is mixed with its neighbour, 2i with 2i + 1, which a process has too; timm's Mixup takes the batch
        from its end, but the batch's order is random. The loss is linear in the target, so that it is the mean of both
        labels'.
        """
        loss = partial(F.cross_entropy, label_smoothing=self.smoothing)
        if not self.mixup:
            return images, lambda logits: loss(logits, labels)
        place = torch.arange(len(labels), device=labels.device)
        other = (place ^ 1).clamp(max=len(labels) - 1)  # of an odd number the last is alone
        share = beta(rng.uniform(rng.named(key, "mixup"), (4,)), self.mixup)

        def mixed(logits: Tensor) -> Tensor:
            return torch.lerp(loss(logits, labels[other]), loss(logits, labels), share.to(logits.dtype))

        return torch.lerp(images[other], images, share.to(images.dtype)), mixed


LABELS = Targets()


def beta(draws: Tensor, alpha: float) -> Tensor:
    """Draws [4,...], uniform in [0, 1) by steps of 2^-24 -> Beta(alpha, alpha) [...], float64.

    Ulrich's polar method for Beta(alpha + 1, alpha + 1) (Devroye, Non-Uniform Random Variate Generation, 1986, IX.4.3),
    the ratio of two gamma variates, each of which a uniform's power takes from alpha + 1 to alpha (IV.6.4).
    """
    u = draws.double() + 2**-25
    x = (1 + (1 - u[0] ** (2 / (2 * alpha + 1))).sqrt() * torch.cos(2 * torch.pi * u[1])) / 2
    return torch.sigmoid(torch.logit(x) + (u[2].log() - u[3].log()) / alpha)
