"""Training speed against the peers: the same shapes, batch and process, blocks of steps in turn.

python ablations/bench.py            needs the extra `test` (timm)
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table

from ablations import bench_tokens, record
from ablations.arms import parse
from ablations.presets import PRECISIONS
from core import engine, rng, vit
from core.errors import InputError, choose
from core.step import AdamW, Batch, objective, start

PEERS = ("timm", "torchvision")


@dataclass(frozen=True)
class Bench:
    """Compare images/s of a training step (loss, gradient, AdamW): ours, timm and torchvision."""

    what: str = "train"
    """train, or tokens: the cost of mixed-resolution tokenization and what fewer tokens save."""
    arms: str = "baseline,flash"
    """Arms of ours, joined by commas."""
    engines: str = "eager"
    """Engines for each of them, joined by commas: eager, compiled."""
    peers: str = "timm,torchvision"
    """timm and torchvision (eager, torch.optim.AdamW), joined by commas; the first is what ratios refer to."""
    image: int = 32
    patch: int = 4
    width: int = 192
    depth: int = 12
    heads: int = 3
    mlp: int = 512
    batch_size: int = 64
    steps: int = 3
    """Steps a block; a block of every contender is run in turn."""
    rounds: int = 7
    """Blocks of each contender."""
    device: str = "cpu"
    precision: str = "fp32"
    json: Path | None = None
    """Also write the figures to this file."""


Contender = Callable[[], object]  # trains one step


def ours(arm: str, how: str, bench: Bench, config: vit.VitConfig, batch: Batch) -> Contender:
    """A training step of one of our arms."""
    loss = objective(config, parse(arm).ops, lambda images, key: images, PRECISIONS[bench.precision])
    step = engine.build(loss, AdamW(), how)
    device = batch[0].device
    params = {name: p.to(device) for name, p in vit.init(config, 0).items()}
    state = [start(params, rng.key(0))]

    def one() -> None:
        state[0], _ = step(state[0], batch)

    return one


def peer(name: str, bench: Bench, config: vit.VitConfig, batch: Batch) -> Contender:
    """The training step a user of timm or torchvision writes; bf16 by autocast, as they do."""
    if name == "timm":
        import timm.models.vision_transformer as library

        model = library.VisionTransformer(
            img_size=config.image,
            patch_size=config.patch,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.heads,
            mlp_ratio=config.mlp / config.width,
            num_classes=config.classes,
        )
    else:
        import torchvision

        model = torchvision.models.VisionTransformer(
            config.image, config.patch, config.depth, config.heads, config.width, config.mlp, num_classes=config.classes
        )
    model = model.to(batch[0].device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    half = bench.precision == "bf16"

    def one() -> None:
        with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=half):
            loss = F.cross_entropy(model(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return one


def measure(contenders: dict[str, Contender], steps: int, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds a step of every block, by contender: warmed up, then one block of each in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for one in contenders.values():
        for _ in range(2):
            one()
    for _ in range(rounds):
        for name, one in contenders.items():
            engine.synchronize(device)
            begin = time.perf_counter()
            for _ in range(steps):
                one()
            engine.synchronize(device)
            seconds[name].append((time.perf_counter() - begin) / steps)
    return seconds


def compare(bench: Bench) -> dict[str, dict[str, float]]:
    """images/s (median and quartiles over blocks) and the median of the blockwise ratios to the first peer."""
    device = torch.device(bench.device)
    config = vit.VitConfig(bench.image, bench.patch, bench.width, bench.depth, bench.heads, bench.mlp, 10)
    images = torch.randn(bench.batch_size, 3, bench.image, bench.image, device=device)
    batch = images, torch.randint(10, (bench.batch_size,), device=device)
    peers = [choose("peer", name, PEERS) for name in bench.peers.split(",")]
    contenders = {name: peer(name, bench, config, batch) for name in peers}
    for arm in bench.arms.split(","):
        for how in bench.engines.split(","):
            contenders[f"{arm}, {how}"] = ours(arm, engine.resolve(how, bench.device), bench, config, batch)
    seconds = measure(contenders, bench.steps, bench.rounds, device)
    reference = seconds[peers[0]]
    return {
        name: {
            "images_per_second": bench.batch_size / median(blocks),
            "lower_quartile": bench.batch_size / quantiles(blocks)[2],
            "upper_quartile": bench.batch_size / quantiles(blocks)[0],
            "ratio": median(a / b for a, b in zip(reference, blocks, strict=True)),
        }
        for name, blocks in seconds.items()
    }


def check(bench: Bench) -> None:
    """InputError for options that cannot be run."""
    choose("device", bench.device, ("cpu", "cuda"))
    choose("precision", bench.precision, PRECISIONS)
    for name in bench.engines.split(","):
        engine.resolve(name, bench.device)
    if bench.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' is not available here: pass --device cpu")
    if bench.rounds < 2 or bench.steps < 1 or bench.batch_size < 1:
        raise InputError("at least 2 rounds, 1 step and a batch of 1 are needed")


def show(figures: dict[str, dict[str, float]], bench: Bench, console: Console) -> None:
    """One row a contender."""
    if bench.what == "tokens":
        for name, figure in figures.items():
            rest = ", ".join(f"{ratio:.3f} {what}" for what, ratio in figure.items() if what != "milliseconds")
            console.print(f"{name:<26} {figure['milliseconds']:8.1f} ms  {rest}", highlight=False)
        return
    reference = bench.peers.split(",")[0]
    table = Table("contender", "images/s", "quartiles", f"× {reference}")
    for name, f in figures.items():
        quartiles = f"{f['lower_quartile']:,.0f} to {f['upper_quartile']:,.0f}"
        table.add_row(name, f"{f['images_per_second']:,.0f}", quartiles, f"{f['ratio']:.3f}")
    console.print(table)


def main() -> None:
    """The command."""
    bench, console = tyro.cli(Bench), Console()
    try:
        check(bench)
        device = torch.device(bench.device)
        if choose("comparison", bench.what, ("train", "tokens")) == "train":
            figures = compare(bench)
        else:
            figures = bench_tokens.compare(
                bench.batch_size,
                device,
                PRECISIONS[bench.precision],
                "compiled" in bench.engines,
                lambda contenders: measure(contenders, bench.steps, bench.rounds, device),
            )
    except (InputError, ModuleNotFoundError) as error:
        hint = "; pip install -e '.[test]'" if isinstance(error, ModuleNotFoundError) else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        sys.exit(2)
    show(figures, bench, console)
    if bench.json:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(bench).items()}
        where = record.environment(bench.device)
        bench.json.write_text(
            json.dumps({"bench": settings, "environment": where, "figures": figures}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
