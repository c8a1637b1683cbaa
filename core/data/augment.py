"""From stored uint8 images to normalised float ones, augmentation included, as a pure function of a key."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from core import rng
from core.errors import InputError
from core.parallel import ALONE, Share

TRIES = 10


def preparation(
    mean: tuple[float, ...],
    std: tuple[float, ...],
    flip: bool = False,
    shift: int = 0,
    rotate: float = 0.0,
    share: Share = ALONE,
    crop: float | None = None,
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """(images uint8 [B,C,H,W], key) -> float32 [B,C,H,W] with (x / 255 - mean) / std; no key: not augmented.

    flip: mirror half of the images. rotate: by up to this many degrees, bilinear. shift: by up to this many
    whole pixels each way, which is a random crop of the image padded by as many. Uncovered pixels are black.
    crop: before all that, resize a box of at least this share of the image's area to the whole (see `boxes`).
    share: whose images these are; an image of a global batch is augmented alike whichever process has it.
    Raises InputError for a shift below 0, a rotation outside [0, 180] or a crop outside (0, 1].
    """
    if shift < 0:
        raise InputError(f"shift {shift} must be 0 or more pixels")
    if not 0 <= rotate <= 180:
        raise InputError(f"rotate {rotate} is outside 0 to 180 degrees")
    if crop is not None and not 0 < crop <= 1:
        raise InputError(f"crop {crop} is outside 0 to 1, 0 excluded: it is the least share of the area, such as 0.08")

    def prepare(images: Tensor, key: Tensor | None) -> Tensor:
        pixels = images.to(torch.float32) / 255
        if key is not None and crop is not None:
            draws = rng.uniform(rng.named(key, "crop"), (2 * TRIES + 2, share.world * len(images)))
            pixels = resized(pixels, *boxes(share.columns(draws), images.shape[-1], crop))
        if key is not None and (flip or shift or rotate):
            draws = share.columns(rng.uniform(key, (4, share.world * len(images))))
            mirror = 1 - 2 * (draws[0] < 0.5) if flip else torch.ones_like(draws[0])
            angle = torch.deg2rad((2 * draws[1] - 1) * rotate)
            x, y = (torch.floor(u * (2 * shift + 1)) - shift for u in draws[2:])
            pixels = affine(pixels, mirror, angle, x, y)
        # filled on the device: a copy from the host cannot be captured in a CUDA graph
        centre, scale = (torch.stack([pixels.new_full((1, 1), v) for v in values]) for values in (mean, std))
        return (pixels - centre) / scale

    return prepare


def boxes(draws: Tensor, side: int, least: float) -> tuple[Tensor, Tensor]:
    """Left and top [2,B], and width and height [2,B], of the boxes of torchvision's RandomResizedCrop in images of this
    side, from uniform draws [2 TRIES + 2,B].

    Of ten boxes the first that is inside an image, else all of the image: the area uniform between this share of the
    image's and all of it, the ratio of width and height log-uniform between 3/4 and 4/3, the place uniform (Szegedy et
    al., CVPR 2015, arXiv 1409.4842).
    """
    area = (least + (1 - least) * draws[:TRIES]) * side**2
    ratio = torch.exp((2 * draws[TRIES:-2] - 1) * math.log(4 / 3))
    size = torch.stack(((area * ratio).sqrt(), (area / ratio).sqrt())).round()
    inside = ((size >= 1) & (size <= side)).all(0)
    first = inside.int().argmax(0).expand(2, 1, -1)
    size = torch.where(inside.any(0), size.gather(1, first)[:, 0], side)
    return torch.floor(draws[-2:] * (side - size + 1)), size


def resized(images: Tensor, place: Tensor, size: Tensor) -> Tensor:
    """Of each image [B,C,S,S] the box at left and top [2,B], of width and height [2,B], resized to all of it; bilinear.
    It never shrinks, so that there is nothing to antialias."""
    side = images.shape[-1]
    place, size = place[..., None].to(images.dtype), size[..., None].to(images.dtype)
    centres = (torch.arange(side, dtype=images.dtype, device=images.device) + 0.5) / side
    pixel = place + torch.minimum((centres * size - 0.5).clamp(min=0), size - 1)
    x, y = (2 * pixel + 1) / side - 1
    grid = torch.stack((x[:, None].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)), -1)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def affine(images: Tensor, mirror: Tensor, angle: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Mirror, then rotate, then shift each image [B,C,S,S]; bilinear, zeros outside.

    mirror: -1 or 1; angle: radians, counter-clockwise; x, y: pixels to the right and down; all [B].
    """
    half = images.shape[-1] / 2
    cos, sin = angle.cos(), angle.sin()
    # grid_sample asks where each output pixel comes from: the inverse map, outermost operation first.
    rotation = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
    offset = rotation @ -torch.stack((x, y), -1)[..., None] / half
    theta = torch.cat((rotation, offset), -1) * torch.stack((mirror, torch.ones_like(angle)), -1)[..., None]
    grid = F.affine_grid(theta.to(images.dtype), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
