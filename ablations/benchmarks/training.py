"""Training speed against the peers: the same shapes, precision, batch and process, blocks of steps in turn.

python ablations/bench.py            needs the extra `test` (timm, transformers)
"""

import gc
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch loads: the memory pass would print a banner

import torch
import tyro
from rich.console import Console
from rich.table import Table

from ablations.benchmarks import data as bench_data
from ablations.benchmarks import tokens as bench_tokens
from ablations.benchmarks.peers import PEERS, Contender, contender
from ablations.study import store as record
from ablations.study.arms import parse
from ablations.study.recipes import PRECISIONS
from core import engine, rng, vit
from core.account import graph
from core.data.splits import Split
from core.errors import InputError, choose
from core.measure import ceiling, gpu_state, idle_share, interleaved, peak_bytes
from core.ops import EXACT
from core.step import AdamW, objective, start

_SMALL = vit.VitConfig(image=32, patch=4, width=192, depth=12, heads=3, mlp=512, classes=10)
_B16 = vit.VitConfig(image=224, patch=16, width=768, depth=12, heads=12, mlp=3072, classes=1000)
SHAPES: dict[str, tuple[vit.VitConfig, int]] = {  # model and batch size
    "4.2M": (_SMALL, 256),
    "4.2M-256-tokens": (replace(_SMALL, patch=2), 256),
    "12M": (replace(_SMALL, width=384, heads=6), 256),
    "B16": (_B16, 64),
    "B16-batch-256": (_B16, 256),
}
WHAT = ("train", "data", "tokens")
Figures = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Bench:
    """Compare images/s of a training step (loss, gradient, AdamW): ours under each engine, and the peers."""

    what: str = "train"
    """train; data: what data, augmentation and logging cost, in memory and streamed; tokens: mixed-resolution
    tokenization."""
    shapes: str = ""
    """Models, joined by commas: 4.2M, 4.2M-256-tokens, 12M, B16, B16-batch-256. All on CUDA; 4.2M else."""
    arms: str = "baseline,flash"
    """Arms of ours, joined by commas."""
    engines: str = ""
    """Engines for each of them: eager, compiled, graphed. All on CUDA; eager else."""
    peers: str = "timm,torchvision,transformers,published"
    """Other libraries and the published study's configuration; the first is what ratios refer to. NAME:compiled puts
    one under torch.compile. On CUDA timm:compiled is added."""
    batch_size: int = 0
    """Images a step; 0: 64 on a CPU, the shape's own on CUDA."""
    steps: int = 0
    """Steps a block (a block of every contender is run in turn); 0: 3 on a CPU, 20 on CUDA."""
    rounds: int = 7
    """Blocks of each contender."""
    device: str = "cpu"
    """cpu or cuda."""
    precision: str = ""
    """fp32, bf16, or both joined by a comma. Both on CUDA; fp32 else."""
    json: Path | None = None
    """Also write the figures to this file."""


def settled(bench: Bench) -> Bench:
    """With everything decided that depends on the device; InputError for what cannot be run."""
    choose("comparison", bench.what, WHAT)
    cuda = choose("device", bench.device, ("cpu", "cuda")) == "cuda"
    if cuda and not torch.cuda.is_available():
        raise InputError("device 'cuda' is not available here: pass --device cpu")
    if bench.rounds < 2 or min(bench.steps, bench.batch_size) < 0:
        raise InputError(
            f"rounds {bench.rounds}, steps {bench.steps}, batch size {bench.batch_size}: at least 2, "
            "0 and 0 (which stands for the device's own)"
        )
    bench = replace(
        bench,
        shapes=bench.shapes or (",".join(SHAPES) if cuda else "4.2M"),
        engines=bench.engines or ("eager,compiled,graphed" if cuda else "eager"),
        precision=bench.precision or ("fp32" if not cuda else "fp32,bf16" if bench.what == "train" else "bf16"),
        steps=bench.steps or (20 if cuda else 3),
        peers=bench.peers + (",timm:compiled" if cuda and "timm:compiled" not in bench.peers else ""),
    )
    for kind, names, legal in (
        ("shape", bench.shapes, SHAPES),
        ("precision", bench.precision, PRECISIONS),
        ("peer", bench.peers.replace(":compiled", ""), PEERS),
    ):
        for name in names.split(","):
            choose(kind, name, legal)
    for name in bench.engines.split(","):
        engine.resolve(choose("engine", name, engine.ENGINES[1:]), bench.device)
    for arm in bench.arms.split(","):
        parse(arm)
    return bench


def ours(arm: str, how: str, config: vit.VitConfig, data: Split, size: int, dtype: torch.dtype) -> Contender:
    """The training loop of one of our arms; a block is a step of the `size` images for every `size` labels."""
    device = data.images.device
    loss = objective(config, parse(arm).ops, lambda images, key: images, dtype)
    params = {name: p.to(device) for name, p in vit.init(config, 0).items()}
    with torch.no_grad():  # what cannot run says so here: inside a compiled graph it would be the compiler's error
        loss(params, (data.images[:2], data.labels[:2]), rng.key(0, device))
    step = engine.build(loss, AdamW(), how)
    loop = engine.loop(how, step, data, size, device, {})
    state = [start(params, rng.key(0, device))]
    order = torch.arange(size, device=device).repeat(len(data.labels) // size)

    def run() -> None:
        state[0], _ = loop.epoch(state[0], order)

    def peak() -> int:
        batch = data.images, data.labels[:size].clone()
        step(state[0], batch)
        return peak_bytes(step, state[0], batch, device=device)

    return Contender(run, peak)


def compare(bench: Bench, config: vit.VitConfig, size: int, precision: str) -> Figures:
    """images/s (median and quartiles over blocks), the median of the blockwise ratios to the first peer, peak bytes of
    a step, MFU, and on CUDA the share of a block in which the GPU idles. The first arm twice, as A/A, shows the noise;
    a contender that cannot run says why instead."""
    device, dtype, steps = torch.device(bench.device), PRECISIONS[precision], bench.steps
    images = torch.randn(size, config.channels, config.image, config.image, device=device)
    batch = Split(images, torch.randint(config.classes, (size,), device=device))
    half, peers = precision == "bf16", bench.peers.split(",")
    build: dict[str, Callable[[], Contender]] = {}
    for name in peers:
        base, _, compiled = name.partition(":")
        build[name] = partial(contender, base, config, batch, half, bool(compiled), steps)
    data = Split(batch.images, batch.labels.repeat(steps))
    pairs = [(arm, how) for arm in bench.arms.split(",") for how in bench.engines.split(",")]
    for arm, how in pairs:
        build[f"{arm}, {how}"] = partial(ours, arm, how, config, data, size, dtype)
    build[f"{pairs[0][0]}, {pairs[0][1]} (A/A)"] = partial(ours, *pairs[0], config, data, size, dtype)
    figures: Figures = {}
    running: dict[str, Callable[[], object]] = {}
    for name, make in build.items():
        try:
            made = make()
            made.run()
            figures[name], running[name] = {"peak_bytes": made.peak(), "idle": idle_share(made.run, device)}, made.run
        except (InputError, torch.cuda.OutOfMemoryError) as error:
            figures[name] = {"error": str(error).splitlines()[0]}
    if "error" in figures[peers[0]]:
        raise InputError(f"'{peers[0]}', which ratios refer to, cannot run: {figures[peers[0]]['error']}")
    seconds, top = interleaved(running, bench.rounds, device), ceiling(dtype, device)
    flops = graph.account(config, EXACT, size).flops
    for name, blocks in seconds.items():
        figures[name] |= _summary(blocks, seconds[peers[0]], steps * size)
        figures[name]["mfu"] = flops * steps / median(blocks) / top
    return figures


def _summary(blocks: list[float], reference: Sequence[float], size: int) -> dict[str, float]:
    lower, _, upper = quantiles(blocks, method="inclusive")
    return {
        "images_per_second": size / median(blocks),
        "lower_quartile": size / upper,
        "upper_quartile": size / lower,
        "ratio": median(a / b for a, b in zip(reference, blocks, strict=True)),
    }


def no_bf16_units() -> str | None:
    """Why bf16 is not faster on this CPU, or None if it has units for it."""
    capability = torch.backends.cpu.get_cpu_capability()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        return None
    return f"this CPU ({capability}) has no bf16 matrix units: bf16 is converted to float32 and back, and not faster"


def show(figures: Figures, title: str, reference: str, console: Console) -> None:
    """One row a contender."""
    table = Table("contender", "images/s", "quartiles", f"× {reference}", "peak MiB", "MFU", "idle %", title=title)
    for name, f in figures.items():
        if "error" in f:
            table.add_row(name, "", f["error"])
            continue
        quartiles = f"{f['lower_quartile']:,.0f} to {f['upper_quartile']:,.0f}"
        speed, peak = f"{f['images_per_second']:,.0f}", f"{f['peak_bytes'] / 2**20:,.0f}"
        idle = "" if f["idle"] is None else f"{100 * f['idle']:.1f}"
        table.add_row(name, speed, quartiles, f"{f['ratio']:.3f}", peak, f"{f['mfu']:.2f}", idle)
    console.print(table)


def train(bench: Bench, console: Console) -> Figures:
    """Every shape and precision, shown as they come."""
    every: Figures = {}
    for shape in bench.shapes.split(","):
        for precision in bench.precision.split(","):
            config, own = SHAPES[shape]
            size = bench.batch_size or (own if bench.device == "cuda" else 64)
            title = f"{shape}, batch {size}, {precision}"
            every[title] = compare(bench, config, size, precision)
            show(every[title], title, bench.peers.split(",")[0], console)
            if precision == "bf16" and bench.device == "cpu" and (why := no_bf16_units()):
                console.print(why)
            torch._dynamo.reset()
            gc.collect()
            if bench.device == "cuda":
                torch.cuda.empty_cache()
    return every


def main() -> None:
    """The command."""
    bench, console = tyro.cli(Bench), Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
    torch.backends.cudnn.allow_tf32 = False
    try:
        bench = settled(bench)
        device, dtype = torch.device(bench.device), PRECISIONS[bench.precision.split(",")[0]]
        if bench.what == "train":
            figures = train(bench, console)
        elif bench.what == "data":
            figures = bench_data.compare(bench.batch_size or 64, bench.rounds, device, dtype)
            bench_data.show(figures, console)
        else:
            figures = bench_tokens.compare(
                bench.batch_size or 64,
                device,
                dtype,
                "compiled" in bench.engines,
                lambda contenders: interleaved(contenders, bench.rounds, device),
            )
            bench_tokens.show(figures, console)
    except (InputError, ModuleNotFoundError) as error:
        hint = "; pip install -e '.[test]'" if isinstance(error, ModuleNotFoundError) else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        sys.exit(2)
    if bench.json:
        settings = asdict(replace(bench, json=None))
        environment = record.environment(bench.device) | gpu_state(device)
        record.write_json(bench.json, {"bench": settings, "environment": environment, "figures": figures})


if __name__ == "__main__":
    main()
