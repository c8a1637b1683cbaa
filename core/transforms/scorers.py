"""Scores of patches for mixed-resolution tokenization: the lowest is split first. None passes a gradient on."""

import math
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from core.errors import InputError, choose

Scorer = Callable[[Tensor, int, int], dict[int, Tensor]]  # (images [B,C,S,S], min patch, max patch) -> scores

BINS, GREY = 512, (0.2989, 0.5870, 0.1140)  # of histograms of grey levels
_SLAB = 1 << 20  # pixels


def resize(images: Tensor, side: int | None) -> Tensor:
    """Images [B,C,S,S] -> [B,C,side,side], bilinear; None: as they are."""
    if side is None or side == images.shape[-1]:
        return images
    return F.interpolate(images, (side, side), mode="bilinear", align_corners=False)


def slab_of(images: Tensor) -> int:
    """Images to work on at a time: all where a compiler fuses, else as many as the cache holds with their copies."""
    return max(1, len(images) if torch.compiler.is_compiling() else _SLAB // images[0].numel())


def check_images(images: Tensor) -> None:
    """InputError unless images are a batch [B,C,S,S] of floating-point squares."""
    if images.ndim != 4 or images.shape[-1] != images.shape[-2]:
        raise InputError(f"images of shape {tuple(images.shape)} are not square [B,C,S,S]; crop or resize them")
    if not len(images):
        raise InputError("the batch of images is empty")
    if not images.is_floating_point():
        raise InputError(f"images are {str(images.dtype)[6:]}; normalise them to floating point first")


def sizes(image: int, min_patch: int, max_patch: int) -> list[int]:
    """Patch sizes from the largest; InputError if they do not fit the image or are not a power of two apart."""
    if min(image, min_patch, max_patch) < 1:
        raise InputError(f"image {image}, min patch {min_patch} and max patch {max_patch} must be at least 1")
    if image % max_patch:
        raise InputError(f"max patch {max_patch} does not divide image {image}")
    ratio, rest = divmod(max_patch, min_patch)
    if rest or ratio & (ratio - 1) or not ratio:
        raise InputError(
            f"max patch {max_patch} must be min patch {min_patch} times a power of two: "
            f"{min_patch}, {2 * min_patch}, {4 * min_patch}, …"
        )
    return [max_patch >> level for level in range(ratio.bit_length())]


def splittable(min_patch: int, max_patch: int) -> list[int]:
    """Sizes that can be split, from the largest."""
    return [max_patch >> i for i in range((max_patch // min_patch).bit_length() - 1)]


def shrink(images: Tensor, k: int) -> Tensor:
    """Bilinear resize by 1/k (a power of two) without antialiasing: the mean of each block's central 2x2 pixels."""
    if k == 1:
        return images
    a, b = k // 2 - 1, k // 2
    rows = images[..., a::k, :] + images[..., b::k, :]
    return (rows[..., a::k] + rows[..., b::k]) / 4


def pixel_blur(images: Tensor, min_patch: int, max_patch: int) -> dict[int, Tensor]:
    """score = -sqrt(mse · size), mse between each patch and its blur (shrunk by size / p, stretched back).

    images [B,C,S,S] as the model sees them -> {size: [B,(S/size)^2]}, raster order. Raises InputError for sizes or
    images that do not fit.
    """
    check_images(images)
    sizes(images.shape[-1], min_patch, max_patch)
    parts = [_blur_scores(part, min_patch, max_patch) for part in images.split(slab_of(images))]
    return {size: torch.cat([part[size] for part in parts]) for size in splittable(min_patch, max_patch)}


def _blur_scores(images: Tensor, min_patch: int, max_patch: int) -> dict[int, Tensor]:
    out = {}
    B, C, S, _ = images.shape
    for size in splittable(min_patch, max_patch):
        grid = S // size
        errors = _blur_errors(images, size // min_patch).view(B, C, grid, min_patch, grid, size).sum((1, 3, 5))
        out[size] = -(errors / (C * size)).sqrt().flatten(1)  # sqrt(sum / (C size^2) · size)
    return out


def _blur_errors(images: Tensor, k: int) -> Tensor:
    """Squared difference from the blur, summed over each k rows: [B,C,S/k,S].

    The blur is stretched back along the rows, and then taken k-th row by k-th row without being written whole.
    """
    n = images.shape[-1] // k
    small = F.pad(shrink(images, k), (1, 1, 1, 1), mode="replicate")
    places = [_neighbour(i, k) for i in range(k)]
    columns = [torch.lerp(small[..., left : left + n], small[..., left + 1 : left + 1 + n], w) for left, w in places]
    wide = torch.stack(columns, dim=-1).flatten(-2)
    total = torch.zeros_like(images[..., ::k, :])
    for i, (top, w) in enumerate(places):
        blurred = torch.lerp(wide[..., top : top + n, :], wide[..., top + 1 : top + 1 + n, :], w)
        error = blurred.sub_(images[..., i::k, :])
        total.addcmul_(error, error)
    return total


def _neighbour(i: int, k: int) -> tuple[int, float]:
    """Left of the two padded neighbours of place i in a block of k, and the weight of the right one."""
    position = (i + 0.5) / k - 0.5
    return (0, position + 1) if position < 0 else (1, position)


def random_scores(images: Tensor, min_patch: int, max_patch: int) -> dict[int, Tensor]:
    """Uniform draws that depend on the image, not on its place in the batch: for control arms.

    An image is told by the means of its rows and of its columns to 1/64, which rounding in its last bits leaves: two
    hashes of these and a patch's number make its draw. (Philox of a constant key takes inductor minutes to compile.)
    """
    parts = (torch.cat((images.mean((1, 3)), images.mean((1, 2))), dim=1) * 64).round()
    factors = _hashed(torch.arange(2 * parts.shape[1], device=images.device)) >> 12
    sums = parts.double() @ factors.double().view(-1, 2)  # whole numbers: exact in any order of the sum
    first, second = (sums.long() & 0xFFFFFFFF).split(1, dim=1)

    def draws(size: int) -> Tensor:
        places = torch.arange((images.shape[-1] // size) ** 2, device=images.device)
        words = _hashed(_hashed((first + size + places * 0x9E3779B1) & 0xFFFFFFFF) ^ second)
        return (words >> 8).to(torch.float32) * 2.0**-24

    return {size: draws(size) for size in splittable(min_patch, max_patch)}


def _hashed(words: Tensor) -> Tensor:
    """32-bit words (int64) mixed one to one, by shifts and products that do not overflow."""
    for factor in (0x7FEB352D, 0x2C1B3C6D):
        words = ((words ^ (words >> 16)) * factor) & 0xFFFFFFFF
    return words ^ (words >> 15)


def entropy_scores(images: Tensor, min_patch: int, max_patch: int) -> dict[int, Tensor]:
    """score = -H, H the entropy in bits of a patch's histogram of grey levels, to 1/4096: the rule of APT (Choudhury et
    al., ICLR 2026, arXiv 2510.18091). It splits what is above a threshold, which gives any number of tokens; here the
    highest entropies are split.

    BINS bins from an image's darkest pixel to its brightest (the authors': of 0 to 255, before normalization). images
    [B,C,S,S] -> {size: [B,(S/size)^2]}, raster order. Raises InputError for sizes or images that do not fit.
    """
    check_images(images)
    sizes(images.shape[-1], min_patch, max_patch)
    parts = [_entropies(part, min_patch, max_patch) for part in images.split(slab_of(images))]
    return {size: -torch.cat([part[size] for part in parts]) for size in splittable(min_patch, max_patch)}


def _entropies(images: Tensor, min_patch: int, max_patch: int) -> dict[int, Tensor]:
    grey = torch.tensordot(images, images.new_tensor(GREY), ([1], [0])) if images.shape[1] == 3 else images.mean(1)
    low, high = grey.amin((1, 2), keepdim=True), grey.amax((1, 2), keepdim=True)
    tiny = torch.finfo(grey.dtype).tiny
    levels = ((grey - low) / (high - low).clamp_min(tiny) * BINS).long().clamp_max(BINS - 1)
    out: dict[int, Tensor] = {}
    counts = grey.new_zeros(0)
    for size in reversed(splittable(min_patch, max_patch)):
        if out:  # a patch's histogram is the sum of its quarters'
            counts = reduce(counts, "B (y p) (x q) bins -> B y x bins", "sum", p=2, q=2)
        else:
            pixels = rearrange(levels, "B (y p) (x q) -> B y x (p q)", p=size, q=size)
            none, one = grey.new_zeros(*pixels.shape[:3], BINS), torch.ones_like(pixels, dtype=grey.dtype)
            counts = none.scatter_add(-1, pixels, one)
        bits = torch.special.entr(counts / size**2).sum(-1).flatten(1) / math.log(2)
        out[size] = (bits * 4096).round() / 4096  # equal histograms in other bins must tie
    return out


def feature_scores(weights: str | None) -> Scorer:
    """The paper's main scorer: how much shufflenet_v2_x0_5 features change when blurred, per patch.

    weights: a file of its state dict (.pth), or None for torchvision's ImageNet weights. Raises InputError where they
    cannot be had, and, when called, for a feature map coarser than the patch grid.
    """
    networks = {"cpu": _shufflenet(weights)}
    if accelerator := torch.accelerator.current_accelerator(check_available=True):
        # made now: within a compiled graph a copy cannot be
        early, late = (deepcopy(part).to(accelerator) for part in networks["cpu"])
        networks[accelerator.type] = early, late

    def scores(images: Tensor, min_patch: int, max_patch: int) -> dict[int, Tensor]:
        side, finest = images.shape[-1], 2 * min_patch
        if finest < 16 and max_patch > min_patch:
            raise InputError(
                f"scorer 'features' sees nothing finer than 16 pixels, and min patch {min_patch} needs {finest}; "
                "use a larger min patch (a larger mrt.image) or --set mrt.scorer=blur"
            )
        early, late = networks[images.device.type]
        with torch.no_grad():
            features = early(images.float())
            if finest >= 32:
                features = late(features)
        return {
            size: _feature_score(features, size // min_patch, side // size) for size in splittable(min_patch, max_patch)
        }

    return scores


def _feature_score(features: Tensor, k: int, grid: int) -> Tensor:
    side = features.shape[-1]
    small = F.interpolate(features, (max(side // k, 1),) * 2, mode="bilinear", align_corners=False)
    blurred = F.interpolate(small, (side, side), mode="bilinear", align_corners=False)
    changes = (features - blurred).square().mean(1, keepdim=True)
    return -F.adaptive_avg_pool2d(changes, grid).flatten(1)


@cache
def _shufflenet(weights: str | None) -> tuple[nn.Module, nn.Module]:
    """Its layers up to stage 3 (stride 16), and from there to conv5 (stride 32), frozen."""
    from torchvision.models import ShuffleNet_V2_X0_5_Weights, shufflenet_v2_x0_5

    others = "pass --set mrt.weights=FILE with its state dict, or --set mrt.scorer=blur (or random)"
    try:
        if weights is None:
            net = shufflenet_v2_x0_5(weights=ShuffleNet_V2_X0_5_Weights.DEFAULT)
        else:
            if not (path := Path(weights).expanduser()).is_file():  # a pipe would be waited for
                raise FileNotFoundError("no such file")
            net = shufflenet_v2_x0_5()
            net.load_state_dict(torch.load(path, weights_only=True))
    except Exception as error:  # network, file and pickle errors are of many kinds
        what = "torchvision's shufflenet_v2_x0_5 weights" if weights is None else f"'{weights}'"
        raise InputError(f"scorer 'features' cannot load {what} ({type(error).__name__}: {error}); {others}") from error
    net = net.eval().requires_grad_(False)
    early = nn.Sequential(net.conv1, net.maxpool, net.stage2, net.stage3)
    return early, nn.Sequential(net.stage4, net.conv5)


SCORERS = ("blur", "entropy", "features", "random")


def scorer_named(name: str, weights: str | None = None) -> Scorer:
    """The scorer of a name; InputError for an unknown one, and for weights that it does not have."""
    choose("mrt scorer", name, SCORERS)
    if name == "features":
        return feature_scores(weights)
    if weights is not None:
        raise InputError(f"mrt weights '{weights}' are for mrt.scorer=features, and this is {name}; leave out one")
    return {"blur": pixel_blur, "entropy": entropy_scores, "random": random_scores}[name]
