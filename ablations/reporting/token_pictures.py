"""Pictures of tokenized images: patch borders drawn, one panel a scale."""

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ablations.study.outcomes import Tokens

BORDER = torch.tensor([255, 212, 0], dtype=torch.uint8)[:, None]  # yellow
DIMMED = 0.25


def draw(tokens: Tokens, path: Path) -> None:
    """Write the picture as PNG."""
    picture = tokenized(torch.from_numpy(tokens.images), torch.from_numpy(tokens.patches))
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)


def tokenized(images: Tensor, selection: Tensor, side: int = 128) -> Tensor:
    """uint8 images [B,C,S,S], grey or in colour, and their patches [B,L,3] (x0, y0, size) -> one uint8 picture [3,H,W].

    A row an image, about `side` pixels high: the image, all its patches, then a panel for each size, from the
    largest, with the rest dimmed.
    """
    scale = max(1, side // images.shape[-1])
    sizes = sorted(selection[..., 2].unique().tolist(), reverse=True)
    rows = []
    for image, chosen in zip(images.expand(-1, 3, -1, -1), selection.tolist(), strict=True):
        large = F.interpolate(image[None], scale_factor=scale)[0]
        panels = [large, _panel(large, chosen, scale, sizes)]
        panels += [_panel(large, chosen, scale, [size]) for size in sizes]
        rows.append(torch.cat([F.pad(panel, (2, 2, 2, 2), value=255) for panel in panels], dim=2))
    return torch.cat(rows, dim=1)


def _panel(image: Tensor, patches: list[list[int]], scale: int, sizes: list[int]) -> Tensor:
    """The patches of these sizes with their borders, the rest dimmed."""
    out = (image * DIMMED).to(torch.uint8)
    for x, y, size in patches:
        if size in sizes:
            left, top, right, bottom = (scale * v for v in (x, y, x + size, y + size))
            out[:, top:bottom, left:right] = image[:, top:bottom, left:right]
            out[:, top, left:right] = out[:, bottom - 1, left:right] = BORDER
            out[:, top:bottom, left] = out[:, top:bottom, right - 1] = BORDER
    return out
