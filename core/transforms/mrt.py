"""Mixed-resolution tokenization (Ronen et al., CVPRW 2023, arXiv 2304.00287): large patches where little happens.

Contract: changes the objective (other tokens). From the (S/P)^2 largest patches of an image, K times the patch
with the lowest score is split into its four quarters; L = (S/P)^2 + 3 K tokens for every image. S image side,
p min patch, P max patch, k = size / p. The greedy rule is done at once, as a top-K of static shape: no loop over
splits, no host synchronisation, one graph.

Nodes are numbered as in a heap: level by level from the largest patches, in Morton order within a level (x in the
even bits, y in the odd). So the children of node j of a level are nodes 4j to 4j+3 of the next, in the order top
left, top right, bottom left, bottom right.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch._subclasses import FakeTensor

from core.errors import InputError
from core.layers import embed, with_class_token
from core.ops import Rewrite, Site, rewrite
from core.transforms.scorers import check_images, pixel_blur, resize, scorer_named, shrink, sizes, slab_of

__all__ = ["legal_tokens", "mrt", "patches", "pixel_blur", "select", "uniform"]

Scores = Mapping[int, Tensor]


def legal_tokens(image: int, min_patch: int, max_patch: int) -> range:
    """The token counts that can be asked for: from all patches at max size to all at min size, in threes."""
    sizes(image, min_patch, max_patch)
    return range((image // max_patch) ** 2, (image // min_patch) ** 2 + 1, 3)


def check_tokens(image: int, min_patch: int, max_patch: int, tokens: int) -> None:
    """InputError, naming the nearest legal counts, unless `tokens` is one."""
    legal = legal_tokens(image, min_patch, max_patch)
    if not isinstance(tokens, int) or tokens not in legal:
        below = min(max(legal[0], tokens - (tokens - legal[0]) % 3), max(legal[0], legal[-1] - 3))
        nearest = dict.fromkeys((below, min(below + 3, legal[-1])))
        raise InputError(
            f"tokens {tokens} cannot be had from image {image} with patches {min_patch} to {max_patch}; nearest: "
            f"{' or '.join(map(str, nearest))} ({legal[0]} to {legal[-1]} in steps of 3)"
        )


def select(scores: Scores, image: int, min_patch: int, max_patch: int, tokens: int) -> Tensor:
    """The patches of every image, [B,L,3] int64, rows (x0, y0, size) in token order (heap order).

    scores: for each size above min_patch, [B,(S/size)^2] in raster order; the lowest is split first. Ties go to the
    lowest heap index. Raises ValueError for illegal sizes or counts, missing or misshapen scores, an empty batch,
    and scores that are not finite (on CUDA and when compiled that last check is left to the device).
    """
    check_tokens(image, min_patch, max_patch, tokens)
    levels = sizes(image, min_patch, max_patch)
    device = next(iter(scores.values())).device if scores else torch.device("cpu")
    table = _nodes(image, levels, device)
    batch = _check_scores(scores, image, levels[:-1], tokens)
    splits = (tokens - (image // max_patch) ** 2) // 3
    exists = [torch.ones(batch, (image // max_patch) ** 2, dtype=torch.bool, device=device)]
    leaves = []
    if len(levels) > 1:
        in_order = [scores[s].detach().flatten(1)[:, _morton(image // s, device)] for s in levels[:-1]]
        split = _split_mask(in_order, splits)
        for level in split:
            leaves.append(exists[-1] & ~level)
            exists.append(level.repeat_interleave(4, dim=1))
    leaves.append(exists[-1])
    position = torch.cat(leaves, dim=1).cumsum(1)
    wanted = torch.arange(1, tokens + 1, device=device).expand(batch, -1)
    return table[torch.searchsorted(position, wanted.contiguous())]


def _check_scores(scores: Scores, image: int, splittable: list[int], tokens: int) -> int:
    """The batch size of well-formed scores."""
    missing = [s for s in splittable if s not in scores]
    if missing:
        raise InputError(f"scores of size {missing[0]} are missing; needed: {', '.join(map(str, splittable))}")
    batch = len(next(iter(scores.values()))) if scores else 1
    if not batch:
        raise InputError("the batch is empty: scores have shape [0, …]")
    for size in splittable:
        shape, expected = tuple(scores[size].shape), (batch, (image // size) ** 2)
        if shape != expected:
            raise InputError(f"scores of size {size} have shape {shape}; image {image} needs {expected}")
        if torch.compiler.is_compiling() or scores[size].is_cuda or isinstance(scores[size], FakeTensor):
            continue  # asking would wait for the device; a score that is not finite comes from such an image
        wrong = int((~scores[size].isfinite()).sum())
        if wrong:
            raise InputError(f"{wrong} of the {scores[size].numel()} scores of size {size} are NaN or infinite")
    return batch


def _morton(grid: int, device: torch.device) -> Tensor:
    """Raster index of every cell of a grid x grid level in Morton order, [grid^2] int64."""
    raster = torch.arange(grid * grid, device=device)
    x, y = raster % grid, raster // grid
    code = torch.zeros_like(raster)
    for bit in range(grid.bit_length()):
        code = code + ((x >> bit & 1) << 2 * bit) + ((y >> bit & 1) << 2 * bit + 1)
    return torch.argsort(code)


def _nodes(image: int, levels: list[int], device: torch.device) -> Tensor:
    """(x0, y0, size) of every node in heap order, [nodes,3] int64."""
    rows = []
    for size in levels:
        grid = image // size
        raster = _morton(grid, device)
        rows.append(torch.stack((raster % grid * size, raster // grid * size, torch.full_like(raster, size)), dim=1))
    return torch.cat(rows)


def _split_mask(scores: list[Tensor], splits: int) -> list[Tensor]:
    """Which nodes the greedy rule splits, by level, from scores [B,n_l] in heap order.

    A node is split when the lowest-scored frontier reaches it: its rank and those of its ancestors decide, by their
    suffix maxima (the largest rank of the whole path, then of what comes after that node, and so on down to its
    own). The greedy order is the ascending lexicographic order of these lists, padded with -1.
    """
    flat = torch.cat(scores, dim=1) + 0.0  # -0.0 becomes 0.0
    rank = torch.argsort(torch.argsort(flat, dim=1, stable=True), dim=1)
    ranks = rank.split([s.shape[1] for s in scores], dim=1)
    slot = torch.arange(len(scores), device=flat.device)
    keys = [torch.where(slot == 0, ranks[0][..., None], -1)]
    for own in ranks[1:]:
        parent = keys[-1].repeat_interleave(4, dim=1)
        larger = parent > own[..., None]
        last = larger.sum(-1, keepdim=True)
        keys.append(torch.where(slot == last, own[..., None], torch.where(larger, parent, -1)))
    order = _lexicographic(torch.cat(keys, dim=1) + 1, flat.shape[1] + 1)
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter(1, order[:, :splits], True)
    return list(mask.split([s.shape[1] for s in scores], dim=1))


def _lexicographic(digits: Tensor, base: int) -> Tensor:
    """Order of the rows of digits [B,n,D], each below `base`, most significant first: [B,n] int64."""
    room = 1
    while base ** (room + 1) < 2**63:
        room += 1
    order = None
    for end in range(digits.shape[-1], 0, -room):
        word = torch.zeros_like(digits[..., 0])
        for digit in digits[..., max(end - room, 0) : end].unbind(-1):
            word = word * base + digit
        if order is None:
            order = torch.argsort(word, dim=1)
        else:
            order = order.gather(1, torch.argsort(word.gather(1, order), dim=1, stable=True))
    assert order is not None
    return order


def patches(images: Tensor, selection: Tensor, min_patch: int) -> Tensor:
    """Content of the chosen patches [B,L,C·p·p]: images [B,C,S,S] resized by 1/k bilinearly without antialiasing.

    selection: [B,L,3] rows (x0, y0, size). Every size is shrunk and cut whole, which copies 4/3 of the image in long
    runs and then whole rows: faster than gathering four pixels for each one that is needed.
    """
    check_images(images)
    slab = slab_of(images)
    parts = zip(images.split(slab), selection.split(slab), strict=True)
    return torch.cat([_patches(part, chosen, min_patch) for part, chosen in parts])


def _patches(images: Tensor, selection: Tensor, p: int) -> Tensor:
    x0, y0, size = selection.unbind(-1)
    rows: list[Tensor] = []
    index, offset, k = torch.zeros_like(size), 0, 1
    while images.shape[-1] % (k * p) == 0:
        grid = images.shape[-1] // (k * p)
        rows.append(rearrange(shrink(images, k), "B C (y p) (x q) -> B (y x) (C p q)", p=p, q=p))
        index = torch.where(size == k * p, offset + y0 // (k * p) * grid + x0 // (k * p), index)
        offset, k = offset + grid * grid, 2 * k
    return torch.cat(rows, dim=1)[torch.arange(len(images), device=images.device)[:, None], index]


def centres(selection: Tensor, min_patch: int) -> Tensor:
    """Patch centres (x, y) in units of the min patch, float32 [B,L,2]."""
    return (selection[..., :2] + selection[..., 2:] / 2) / min_patch


def sincos(positions: Tensor, width: int) -> Tensor:
    """Sinusoids of positions (x, y) [...,2] -> [...,D]: x in the first half of the width, y in the second."""
    half = width // 2
    count = half // 2
    frequency = torch.arange(count, device=positions.device, dtype=torch.float64) / max(count - 1, 1)
    angle = positions[..., None].double() * 10000.0**-frequency  # [...,2,count]
    waves = torch.cat((angle.sin(), angle.cos()), dim=-1)
    waves = F.pad(waves, (0, half - 2 * count)).flatten(-2)
    return F.pad(waves, (0, width - 2 * half)).float()


def _embedded(site: Site, images: Tensor, selection: Tensor) -> Tensor:
    """Chosen patches -> tokens with positions, the class token first, without one."""
    config = site.config
    tokens = embed(site, patches(images, selection, config.patch))
    positions = sincos(centres(selection, config.patch), config.width).to(tokens.dtype)
    return with_class_token(site, tokens + positions)


def mrt(
    tokens: int = 64,
    min_patch: int = 2,
    max_patch: int = 8,
    scorer: str = "blur",
    image: int | None = None,
    weights: str | None = None,
    patch_norm: bool | None = None,
) -> Rewrite:
    """Replace `tokenize`: L tokens of mixed sizes, embedded by one map, sinusoidal positions at their centres.

    scorer: "blur", "entropy", "features" (shufflenet_v2_x0_5; weights: a file of them, else torchvision's download)
    or "random". image: side that images are first resized to, inside the step. patch_norm: the model's, if not None.
    The model's patch becomes the min patch. Raises InputError for illegal sizes, counts and scorers; where the
    image's side is not given, when called.
    """
    layout = selector(tokens, min_patch, max_patch, scorer, image, weights)
    asked = {"patch": min_patch, "image": image, "patch_norm": patch_norm}
    fields: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}

    def tokenize(site: Site, images: Tensor) -> Tensor:
        if site.config.patch != min_patch:
            raise InputError(f"mrt with min patch {min_patch} needs a model of that patch, not {site.config.patch}")
        return _embedded(site, *layout(images))

    return rewrite("mrt", replace={"tokenize": tokenize}, config=lambda config: replace(config, **fields))


def selector(
    tokens: int, min_patch: int, max_patch: int, scorer: str, image: int | None, weights: str | None, **_: object
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """images [B,C,S,S] -> (images as resized, their selection [B,L,3]) under `mrt` with these parameters."""
    scores_of = scorer_named(scorer, weights)
    if image is not None:
        check_tokens(image, min_patch, max_patch, tokens)

    def layout(images: Tensor) -> tuple[Tensor, Tensor]:
        check_images(images)
        side = image or images.shape[-1]
        check_tokens(side, min_patch, max_patch, tokens)
        resized = resize(images, side)
        with torch.no_grad():  # no gradient flows through the scores
            scores = scores_of(resized.to(torch.promote_types(resized.dtype, torch.float32)), min_patch, max_patch)
            selection = select(scores, side, min_patch, max_patch, tokens)
        return resized, selection.expand(len(images), -1, -1)  # without scores it is one for all

    return layout


def uniform(patch: int = 4, image: int | None = None) -> Rewrite:
    """The control for `mrt`: the whole grid of one patch size, the same sinusoidal positions, in Morton order.

    image: side that images are first resized to.
    """
    fields: dict[str, Any] = {"patch": patch} if image is None else {"patch": patch, "image": image}

    def tokenize(site: Site, images: Tensor) -> Tensor:
        images = resize(images, image)
        nodes = _nodes(images.shape[-1], [patch], images.device)
        return _embedded(site, images, nodes.expand(len(images), -1, -1))

    return rewrite("uniform", replace={"tokenize": tokenize}, config=lambda config: replace(config, **fields))
