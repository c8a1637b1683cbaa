"""What mixed-resolution tokenization costs and saves: `python ablations/bench.py --what tokens`.

Three comparisons at 256/16/64/64 (image, min patch, max patch, tokens): the tokenizer against a plain transcription
of the published algorithm's steps; the tokenizer's share of a training step; the step at 64 tokens against 256.
"""

from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from ablations.study.arms import parse
from core import engine, rng, vit
from core.step import AdamW, objective, start
from core.transforms.mrt import patches, select
from core.transforms.scorers import pixel_blur

IMAGE, LOW, HIGH, TOKENS = 256, 16, 64, 64

Measure = Callable[[dict[str, Callable[[], object]]], dict[str, list[float]]]


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


def train_step(
    name: str, settings: dict[str, dict[str, int]], images: Tensor, labels: Tensor, dtype: torch.dtype
) -> Callable[[], object]:
    """A training step of the 4.2 M parameter study model under an arm."""
    arm = parse(name, settings)
    fields = {"image": IMAGE, "patch": LOW} | arm.shape
    config = vit.VitConfig(width=192, depth=12, heads=3, mlp=512, classes=10, **fields)
    step = engine.build(objective(config, arm.ops, lambda x, key: x, dtype), AdamW(), "eager")
    device = images.device
    state = [start({n: p.to(device) for n, p in vit.init(config, 0).items()}, rng.key(0))]

    def one() -> None:
        state[0], _ = step(state[0], (images, labels))

    return one


def compare(
    batch: int, device: torch.device, dtype: torch.dtype, compiled: bool, measure: Measure
) -> dict[str, dict[str, float]]:
    """Milliseconds of each contender and the ratios that the comparisons are about."""
    images = torch.randn(batch, 3, IMAGE, IMAGE, device=device)
    labels = torch.randint(10, (batch,), device=device)
    mixed = {"mrt": {"tokens": TOKENS, "min_patch": LOW, "max_patch": HIGH}}
    contenders: dict[str, Callable[[], object]] = {
        "transcription": lambda: transcription(images),
        "tokenizer": lambda: tokenizer(images),
        "step, mrt, 64 tokens": train_step("flash+mrt", mixed, images, labels, dtype),
        "step, uniform, 256 tokens": train_step("flash+uniform", {"uniform": {"patch": LOW}}, images, labels, dtype),
    }
    if compiled:
        fused = torch.compile(tokenizer, fullgraph=True, dynamic=False)
        contenders["tokenizer, compiled"] = lambda: fused(images)
    seconds = measure(contenders)
    figures = {name: {"milliseconds": 1000 * median(blocks)} for name, blocks in seconds.items()}
    for name in [name for name in figures if name.startswith("tokenizer")]:
        figures[name]["of the transcription"] = _ratio(seconds[name], seconds["transcription"])
        figures[name]["of the mrt step"] = _ratio(seconds[name], seconds["step, mrt, 64 tokens"])
    figures["step, mrt, 64 tokens"]["of the uniform step"] = _ratio(
        seconds["step, mrt, 64 tokens"], seconds["step, uniform, 256 tokens"]
    )
    return figures


def _ratio(a: list[float], b: list[float]) -> float:
    return median(x / y for x, y in zip(a, b, strict=True))


def show(figures: dict[str, dict[str, float]], console: Console) -> None:
    """One line a contender."""
    for name, figure in figures.items():
        rest = ", ".join(f"{ratio:.3f} {what}" for what, ratio in figure.items() if what != "milliseconds")
        console.print(f"{name:<26} {figure['milliseconds']:8.1f} ms  {rest}", highlight=False)
