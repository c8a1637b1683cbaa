"""What a benchmark is asked for, and its figures."""

import gc
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from rich.console import Console

from ablations.benchmarks import contest, data, tokens, training
from ablations.benchmarks.contest import Figures
from ablations.benchmarks.peers import PEERS
from ablations.study.arms import PRECISIONS
from core import engine
from core.data import sets
from core.errors import InputError, choose, within
from core.vit import VitConfig

WHAT = ("train", "data", "tokens")
OF_TRAIN = ("shapes", "image", "arms", "peers")  # options
MOST = 1000  # rounds, and steps of a block


@dataclass(frozen=True)
class Bench:
    """Compare images/s of a training step (loss, gradient, AdamW): ours under each engine, and the peers."""

    what: str = "train"
    """train; data: what data, augmentation and logging cost, in memory and streamed; tokens: mixed-resolution
    tokenization."""
    shapes: str = ""
    """Models, joined by commas: quick (the preset's), 4.2M, 4.2M-256-tokens, 12M, B16, B16-batch-256. All on CUDA; 4.2M
    and quick else. Or timm:NAME, …: a module of others in our loop, against the same one in a plain loop, by engine."""
    image: int = 224
    """Side in pixels of the images of a module of others."""
    arms: str = "baseline,flash,readout,flash+readout"
    """Arms of ours, joined by commas; "checkpointing" rebuilds every block from its input, beside budget@SIZE."""
    engines: str = ""
    """Engines for each of them: eager, compiled, graphed. All on CUDA; eager else."""
    peers: str = "timm,torchvision,transformers,published"
    """Other libraries and the published study's configuration, or none; the first (of none, the first arm) is what
    ratios refer to. NAME:compiled puts one under torch.compile. On CUDA timm:compiled is added."""
    batch_size: int = 0
    """Images a step; 0: 64 on a CPU (at most the shape's own), the shape's own on CUDA."""
    steps: int = 0
    """Steps a block (a block of every contender is run in turn); 0: 3 on a CPU, 20 on CUDA."""
    rounds: int = 7
    """Blocks of each contender."""
    device: str = "cpu"
    """cpu or cuda."""
    precision: str = ""
    """fp32, bf16, or both joined by a comma. Both on CUDA; fp32 else."""
    json: Path | None = None
    """Also write the figures to this file: by shape and contender ("ARM, ENGINE", or a peer's name), among others the
    ratio to the first peer's speed."""


def settled(bench: Bench) -> Bench:
    """With everything decided that depends on the device; InputError for what cannot be run."""
    choose("comparison", bench.what, WHAT)
    cuda = choose("device", bench.device, ("cpu", "cuda")) == "cuda"
    if cuda and not torch.cuda.is_available():
        raise InputError("device 'cuda' is not available here: pass --device cpu")
    within("rounds", bench.rounds, 2, MOST)
    within("steps", bench.steps, 0, MOST)
    within("batch size", bench.batch_size, 0, 2**20)
    within("image", bench.image, 1, sets.MOST)
    _belonging(bench)
    if bench.json and (not bench.json.parent.is_dir() or (bench.json.exists() and not bench.json.is_file())):
        raise InputError(f"'{bench.json}' is no file in a folder that is there; pass --json FILE.json")
    bench = replace(
        bench,
        shapes=bench.shapes or (",".join(training.SHAPES) if cuda else "4.2M,quick"),
        engines=bench.engines or ("eager,compiled,graphed" if cuda else "eager"),
        precision=bench.precision or ("fp32" if not cuda else "fp32,bf16" if bench.what == "train" else "bf16"),
        steps=bench.steps or (20 if cuda else 3),
        peers=bench.peers + (",timm:compiled" if cuda and "timm" in bench.peers.split(",") else ""),
    )
    shapes = [*training.SHAPES, *(name for name in bench.shapes.split(",") if ":" in name)]
    for kind, names, legal in (
        ("shape", bench.shapes, shapes),
        ("precision", bench.precision, list(PRECISIONS)),
        ("peer", bench.peers, [*PEERS, *(f"{name}:compiled" for name in PEERS), "none"]),
    ):
        for name in names.split(","):
            choose(kind, name, legal)
    for name in bench.engines.split(","):
        engine.resolve(choose("engine", name, engine.ENGINES[1:]), bench.device)
    for arm in bench.arms.split(","):
        training.operations(arm)
    return bench


def _belonging(bench: Bench) -> None:
    """InputError for an option that the comparison would not look at."""
    given = [name for name in (*OF_TRAIN, "engines") if getattr(bench, name) != getattr(Bench, name)]
    if bench.what != "train" and "," in bench.precision:
        raise InputError(f"--what {bench.what} is of one precision, and --precision has {bench.precision}; name one")
    others = [":" in name for name in bench.shapes.split(",")]
    for name in given:
        if bench.what != "train" and (name, bench.what) != ("engines", "tokens"):
            raise InputError(f"--{name} is for --what train, and this is {bench.what}; leave it out")
        if name == "image" and not any(others):
            raise InputError(f"--image {bench.image} is for modules of others (--shapes timm:NAME); leave it out")
        if name in ("arms", "peers") and all(others):
            raise InputError(f"--{name} is for our own models, and --shapes names others' alone; leave it out")


def train(bench: Bench, device: torch.device, console: Console) -> dict[str, Figures]:
    """Every shape, by its name, and precision (in the name where there are two), shown as they come."""
    every: dict[str, Figures] = {}
    precisions = bench.precision.split(",")
    peers = [name for name in bench.peers.split(",") if name != "none"]
    arms, engines = bench.arms.split(","), bench.engines.split(",")
    for shape in bench.shapes.split(","):
        plain = [(["plain loop" if how == "eager" else "plain loop:compiled"], ["baseline"], [how]) for how in engines]
        for precision, lists in product(precisions, plain if ":" in shape else [(peers, arms, engines)]):
            config, own = training.shape(shape, bench.image, device)
            size = bench.batch_size or (own if bench.device == "cuda" else min(own, 64))
            training.need_memory(config, size, device)
            build = training.contenders(config, size, bench.steps, precision, device, *lists)
            dtype = PRECISIONS[precision]
            figures = training.compare(build, config, size * bench.steps, bench.rounds, dtype, device)
            if isinstance(config, VitConfig):
                training.foretold(figures, config, arms, size, dtype)
            several = [precision] * (len(precisions) > 1) + lists[2] * (":" in shape)
            every[", ".join([shape, *several])] = figures
            training.show(figures, f"{shape}, batch {size}, {precision}", console)
            if precision == "bf16" and bench.device == "cpu" and (why := training.no_bf16_units()):
                console.print(why)
            torch._dynamo.reset()
            gc.collect()
            if bench.device == "cuda":
                torch.cuda.empty_cache()
    return every


def compared(bench: Bench, console: Console) -> dict[str, Figures]:
    """The figures of what was asked for, by shape or by the comparison's name."""
    device, dtype = torch.device(bench.device), PRECISIONS[bench.precision.split(",")[0]]
    if bench.what == "train":
        return train(bench, device, console)
    size = bench.batch_size or 64
    plain = replace(data.CONFIG, dropout=0.0)  # whose draws take long to be counted
    training.need_memory(plain if bench.what == "data" else tokens.CONFIG, size, device)
    if bench.what == "data":
        figures = data.compare(size, bench.rounds, device, dtype)
        contest.show_shares(figures, "an epoch", "of an epoch", console)
    else:
        figures = tokens.compare(size, bench.rounds, device, dtype, "compiled" in bench.engines)
        sizes = f"{tokens.IMAGE} pixels, patches {tokens.LOW} to {tokens.HIGH}, {tokens.TOKENS} tokens"
        contest.show_shares(figures, sizes, "of the step it saves or is part of", console)
    return {bench.what: figures}
