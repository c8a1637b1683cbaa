"""Training speed against the peers: the same shapes, precision, batch and process."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from ablations.benchmarks import contest, ours, peers
from ablations.benchmarks.contest import Contender, Figures
from ablations.study.arms import PRECISIONS, parse
from ablations.study.presets import PRESETS
from core import engine, sizes
from core.account.step import account, planned
from core.data.splits import Split
from core.errors import InputError
from core.foreign import sources
from core.foreign.model import Foreign
from core.layers import EXACT
from core.measure import ceiling, idle_share
from core.model import Config
from core.ops import Ops, Site, rewrite
from core.vit import VitConfig

_SMALL = VitConfig(image=32, patch=4, width=192, depth=12, heads=3, mlp=512, classes=10)
_B16 = VitConfig(image=224, patch=16, width=768, depth=12, heads=12, mlp=3072, classes=1000)
_QUICK = PRESETS["quick"]
_SIDE = _QUICK.image or 8  # of digits
CHECKPOINTING = "checkpointing"  # every block rebuilt from its input: what `budget` is compared with
SHAPES: dict[str, tuple[VitConfig, int]] = {  # model and batch size
    "quick": (
        VitConfig(_SIDE, _QUICK.patch_of(_SIDE), _QUICK.width, _QUICK.depth, _QUICK.heads, _QUICK.mlp, classes=10),
        _QUICK.batch_size,
    ),
    "4.2M": (_SMALL, 256),
    "4.2M-256-tokens": (replace(_SMALL, patch=2), 256),
    "12M": (replace(_SMALL, width=384, heads=6), 256),
    "B16": (_B16, 64),
    "B16-batch-256": (_B16, 256),
}


def shape(name: str, image: int, device: torch.device) -> tuple[Config, int]:
    """Model and batch size: one of SHAPES, or a module of others (see core.foreign.sources), for this image's side."""
    if name in SHAPES:
        return SHAPES[name]
    return sources.load(name, image, _B16.channels, _B16.classes, str(device)), 64


def need_memory(config: Config, size: int, device: torch.device) -> None:
    """InputError for a plain step of so many images that the device has no memory for."""
    peak = account(config, EXACT, size).peak_bytes
    sizes.need(peak, f"a step of {size:,} images", "pass a smaller --batch-size", device.type)


def contenders(
    config: Config,
    size: int,
    steps: int,
    precision: str,
    device: torch.device,
    names: Sequence[str],
    arms: Sequence[str],
    engines: Sequence[str],
) -> dict[str, Callable[[], Contender]]:
    """What builds each contender's block of `steps` steps: peers by name (NAME or NAME:compiled), every arm of ours
    under every engine, and the first of these twice, as A/A, which shows the noise."""
    images = torch.randn(size, config.channels, config.image, config.image, device=device)
    classes = (config.shape if isinstance(config, Foreign) else config).classes
    labels = torch.randint(classes, (size,), device=device)
    build: dict[str, Callable[[], Contender]] = {}
    for name in names:
        base, _, compiled = name.partition(":")
        batch, half = (images, labels), precision == "bf16"
        build[name] = partial(peers.contender, base, config, batch, half, bool(compiled), steps)
    split, order = Split(images, labels.repeat(steps)), torch.arange(size, device=device).repeat(steps)
    for arm in arms:
        for how in engines:
            build[f"{arm}, {how}"] = partial(
                ours.contender, operations(arm), config, split, order, size, how, PRECISIONS[precision], device
            )
    first = f"{arms[0]}, {engines[0]}"
    return build | {f"{first} (A/A)": build[first]}


def operations(arm: str) -> Ops:
    """Those of an arm's name, or of CHECKPOINTING."""
    blockwise = {"budget": {"plan": (("block",),)}}
    return parse("budget", blockwise).ops if arm == CHECKPOINTING else parse(arm).ops


def foretold(figures: Figures, config: VitConfig, arms: Sequence[str], size: int, dtype: torch.dtype) -> None:
    """Add to ours what the account says of a step: tokens at the end, FLOPs over the plain model's, peak bytes."""
    plain = account(config, EXACT, size, dtype).flops
    for arm in arms:
        tokens: list[int] = []

        def readout(inner: Callable[..., Tensor], site: Site, x: Tensor, seen: list[int] = tokens) -> Tensor:
            seen.append(x.shape[1])
            return inner(site, x)

        try:
            ops = planned(config, operations(arm), size, dtype)
            cost = account(config, rewrite("counted", wrap={"readout": readout})(ops), size, dtype)
        except InputError:
            continue  # its row says why
        said = {"tokens": tokens[0], "flops": cost.flops / plain, "predicted_bytes": cost.peak_bytes}
        for name in figures.keys() & {f"{arm}, {how}" for how in engine.ENGINES}:
            figures[name] |= said


def compare(
    build: Mapping[str, Callable[[], Contender]],
    config: Config,
    images: int,
    rounds: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Figures:
    """Figures of blocks of so many images: of `contest` against the first contender, images a second, peak bytes of a
    step, MFU by the FLOPs of the plain model, and on CUDA the share of a block in which the GPU idles. A contender that
    cannot run says why instead."""
    figures: Figures = {}
    running: dict[str, Callable[[], object]] = {}
    for name, make in build.items():
        try:
            made = make()
            made.run()
            figures[name], running[name] = {"peak_bytes": made.peak(), "idle": idle_share(made.run, device)}, made.run
        except (InputError, torch.cuda.OutOfMemoryError) as error:
            figures[name] = {"error": str(error).splitlines()[0]}
    reference = next(iter(build))
    if "error" in figures[reference]:
        raise InputError(f"'{reference}', which ratios refer to, cannot run: {figures[reference]['error']}")
    flops = account(config, EXACT, 1).flops * images / ceiling(dtype, device)
    for name, figure in contest.contest(running, rounds, device, reference).items():
        seconds = figure["seconds"]
        figures[name] |= figure | {"images_per_second": images / seconds, "mfu": flops / seconds}
    return figures


def no_bf16_units() -> str | None:
    """Why bf16 is not faster on this CPU, or None if it has units for it."""
    capability = torch.backends.cpu.get_cpu_capability()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        return None
    return f"this CPU ({capability}) has no bf16 matrix units: bf16 is converted to float32 and back, and not faster"


def show(figures: Figures, title: str, console: Console) -> None:
    """One row a contender."""
    columns: dict[str, contest.Column] = {
        "images/s": lambda f: f"{f['images_per_second']:,.0f}",
        "quartiles": lambda f: " to ".join(
            f"{f['images_per_second'] * f['seconds'] / f[bound]:,.0f}" for bound in ("upper_quartile", "lower_quartile")
        ),
        f"× {next(iter(figures))}": lambda f: f"{f['ratio']:.3f}",
        "by FLOPs": lambda f: f"{1 / f['flops']:.3f}" if "flops" in f else "",
        "FLOPs": contest.optional("flops", ".3f"),
        "tokens": contest.optional("tokens", ""),
        "peak MiB": lambda f: f"{f['peak_bytes'] / 2**20:,.1f}",
        "predicted": lambda f: f"{f['predicted_bytes'] / 2**20:,.1f}" if "predicted_bytes" in f else "",
        "MFU": lambda f: f"{f['mfu']:.2f}",
        "idle": contest.optional("idle", ".1%"),
    }
    contest.show(figures, title, columns, console)
