"""What mixed-resolution tokenization costs and saves.

Three comparisons at 256/16/64/64 (image, min patch, max patch, tokens): the tokenizer against a plain transcription
of the published algorithm's steps; the tokenizer's share of a training step; the step at 64 tokens against 256.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ablations.benchmarks import contest, ours
from ablations.benchmarks.contest import Figures
from ablations.study.arms import Settings, parse
from core.data.splits import Split
from core.transforms.mrt import patches, select
from core.transforms.scorers import pixel_blur
from core.vit import VitConfig

IMAGE, LOW, HIGH, TOKENS = 256, 16, 64, 64
CONFIG = VitConfig(IMAGE, LOW, width=192, depth=12, heads=3, mlp=512, classes=10)


def tokenizer(images: Tensor) -> Tensor:
    """Scores, selection and patch contents [B,L,C·p·p]."""
    selection = select(pixel_blur(images, LOW, HIGH), IMAGE, LOW, HIGH, TOKENS)
    return patches(images, selection, LOW)


def transcription(images: Tensor) -> Tensor:
    """The same as the published description goes: every scale resized and unfolded whole, a loop of argmin."""
    sizes = [HIGH, HIGH // 2, LOW]
    shrunk = {s: F.interpolate(images, scale_factor=LOW / s, mode="bilinear") for s in sizes}
    contents = torch.cat([F.unfold(shrunk[s], LOW, stride=LOW).transpose(1, 2) for s in sizes], dim=1)
    scores = []
    for s in sizes[:-1]:
        errors = (images - F.interpolate(shrunk[s], scale_factor=s / LOW, mode="bilinear")).square()
        mse = F.unfold(errors, s, stride=s).mean(1)
        scores.append(-(mse * s).sqrt())
    counts = [(IMAGE // s) ** 2 for s in sizes]
    flat = torch.cat([*scores, images.new_full((len(images), counts[-1]), torch.inf)], dim=1)
    present = torch.zeros_like(flat, dtype=torch.bool)
    present[:, : counts[0]] = True
    children = torch.tensor(_children(sizes, counts), device=images.device)
    for _ in range((TOKENS - counts[0]) // 3):
        lowest = torch.where(present, flat, torch.inf).argmin(1, keepdim=True)
        present.scatter_(1, lowest, False)
        present.scatter_(1, children[lowest[:, 0]], True)
    chosen = present.nonzero()[:, 1].reshape(len(images), TOKENS)
    return contents.gather(1, chosen[..., None].expand(-1, -1, contents.shape[-1]))


def _children(sizes: list[int], counts: list[int]) -> list[list[int]]:
    """Indices of each splittable patch's quarters, sizes one after another, in raster order."""
    rows, offset = [], 0
    for size, count in zip(sizes[:-1], counts[:-1], strict=True):
        offset, grid = offset + count, IMAGE // size
        for i in range(count):
            y, x = divmod(i, grid)
            rows.append([offset + (2 * y + dy) * 2 * grid + 2 * x + dx for dy in (0, 1) for dx in (0, 1)])
    return rows


def compare(batch: int, rounds: int, device: torch.device, dtype: torch.dtype, compiled: bool) -> Figures:
    """Figures of each contender against the transcription; share: of a step's time under mrt (for the tokenizer) and
    under uniform (for the step with mrt)."""
    images = torch.randn(batch, 3, IMAGE, IMAGE, device=device)
    split, order = Split(images, torch.randint(10, (batch,), device=device)), torch.arange(batch, device=device)

    def step(name: str, settings: Settings) -> Callable[[], object]:
        arm = parse(name, settings)
        return ours.contender(arm.ops, arm.ops.config(CONFIG), split, order, batch, "eager", dtype, device).run

    mixed, uniform = "step, mrt, 64 tokens", "step, uniform, 256 tokens"
    contenders: dict[str, Callable[[], object]] = {
        "transcription": lambda: transcription(images),
        "tokenizer": lambda: tokenizer(images),
        mixed: step("flash+mrt", {"mrt": {"tokens": TOKENS, "min_patch": LOW, "max_patch": HIGH}}),
        uniform: step("flash+uniform", {"uniform": {"patch": LOW}}),
    }
    if compiled:
        fused = torch.compile(tokenizer, fullgraph=True, dynamic=False)
        contenders["tokenizer, compiled"] = lambda: fused(images)
    figures = contest.contest(contenders, rounds, device, "transcription")
    for name, figure in figures.items():
        whole = uniform if name == mixed else mixed if name.startswith("tokenizer") else None
        figure["share"] = whole and figure["seconds"] / figures[whole]["seconds"]
    return figures
