"""From stored uint8 images to normalised float ones, augmentation included, as a pure function of a key."""

import torch
import torch.nn.functional as F
from torch import Tensor

from core import rng
from core.errors import InputError
from core.parallel import ALONE, Share
from core.step import Prepare


def preparation(
    mean: tuple[float, ...],
    std: tuple[float, ...],
    flip: bool = False,
    shift: int = 0,
    rotate: float = 0.0,
    share: Share = ALONE,
) -> Prepare:
    """(images uint8 [B,C,H,W], key) -> float32 [B,C,H,W] with (x / 255 - mean) / std; no key: not augmented.

    flip: mirror half of the images. rotate: by up to this many degrees, bilinear. shift: by up to this many
    whole pixels each way, which is a random crop of the image padded by as many. Uncovered pixels are black.
    share: whose images these are; an image of a global batch is augmented alike whichever process has it.
    Raises InputError for a shift below 0 or a rotation outside [0, 180].
    """
    if shift < 0:
        raise InputError(f"shift {shift} must be 0 or more pixels")
    if not 0 <= rotate <= 180:
        raise InputError(f"rotate {rotate} is outside 0 to 180 degrees")

    def prepare(images: Tensor, key: Tensor | None) -> Tensor:
        pixels = images.to(torch.float32) / 255
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
