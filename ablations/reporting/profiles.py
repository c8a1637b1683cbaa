"""Profiles as text and images, beside the baseline's, in each arm's folder and in TensorBoard: operations.md,
categories.png, memory.png."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ablations.reporting import figures
from ablations.study.arms import BASELINE
from ablations.study.profiling import CATEGORIES, Operation, Profile, difference, load
from ablations.study.store import write_text

_SHOWN = 25  # rows of a table
_COLOURS = (figures.BLUE, figures.GREY)


def views(folders: dict[str, Path], baseline: str = BASELINE) -> list[Path]:
    """Rebuild text and images of every arm, with its difference from the baseline if that is among them, and write
    them as TensorBoard events; returns their paths. InputError for a folder without a profile."""
    from torch.utils.tensorboard import SummaryWriter

    profiles = {arm: load(folder) for arm, folder in folders.items()}
    written: list[Path] = []
    for arm, folder in folders.items():
        texts, images = _draw(profiles[arm], profiles.get(baseline), baseline, folder)
        for old in folder.glob("events.out.tfevents*"):
            old.unlink()
        with SummaryWriter(str(folder)) as writer:
            for tag, text in texts.items():
                writer.add_text(tag, text, 0)
            for path in images:
                writer.add_image(path.stem, np.asarray(Image.open(path).convert("RGB")), 0, dataformats="HWC")
        written += [folder / "operations.md", *images]
    return written


def _draw(made: Profile, reference: Profile | None, baseline: str, folder: Path) -> tuple[dict[str, str], list[Path]]:
    """Write operations.md and the images; returns the texts by tag and the images' paths."""
    texts = {"operations": _operations_text(made), "difference": _difference_text(made, reference, baseline)}
    write_text(folder / "operations.md", "\n".join(texts.values()))
    shown = [p for p in (made, reference if made.arm != baseline else None) if p]
    for name, draw in (("categories", _categories), ("memory", _memory)):
        figure, axis = figures.pyplot().subplots(figsize=(7, 4.2), layout="constrained")
        draw(axis, shown)
        axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
        figures.save(figure, folder / f"{name}.png")
    return texts, [folder / "categories.png", folder / "memory.png"]


def _markdown(header: str, rows: Iterable[str]) -> str:
    lines = [header, "|".join("---" if t in ("operation", "category") else "---:" for t in header.split(" | ")), *rows]
    return "\n" + "".join(f"| {line} |\n" for line in lines)


def _operations_text(made: Profile) -> str:
    rest, whole = made.operations[_SHOWN:], made.ms or 1
    other = Operation(f"{len(rest)} others", "", *(sum(o[i] for o in rest) for i in (2, 3, 4)))  # type: ignore[misc]
    what = "kernels" if made.device.startswith("cuda") else "operations"
    text = (
        f"# {made.arm}\n\nA step takes {made.wall_ms:,.1f} ms without the profiler (median of {made.steps}) and "
        f"{made.profiled_ms:,.1f} ms with it (mean), {made.ms:,.1f} ms of them in {what}. Times below include the "
        "profiler's own cost: for proportions only. All are means a step; ms and MiB (allocated less freed) are those "
        "of the operation itself, not of others that it calls.\n"
    )
    return text + _markdown(
        "operation | category | calls | ms | share % | MiB",
        (
            f"`{o.name}` | {o.category} | {o.calls:,.1f} | {o.ms:,.3f} | {100 * o.ms / whole:.2f} | {o.mib:,.2f}"
            for o in (*made.operations[:_SHOWN], *([other] if rest else ()))
        ),
    )


def _difference_text(made: Profile, reference: Profile | None, baseline: str) -> str:
    if made.arm == baseline:
        return f"## Difference\n\n`{baseline}` is what other arms are compared with.\n"
    if reference is None:
        return f"## Difference\n\nNo profile of `{baseline}`: no difference from it.\n"
    text = f"## Difference from `{baseline}`\n\nMeans a step under the profiler, without error bars.\n"
    for title, changes in zip(("category", "operation"), difference(made, reference).values(), strict=True):
        rows = (
            f"`{c.name}` | {c.arm[0]:,.3f} | {c.baseline[0]:,.3f} | {c.ms:+,.3f} | {c.arm[1]:,.1f} | "
            f"{c.baseline[1]:,.1f} | {c.kind}"
            for c in changes[:_SHOWN]
        )
        text += _markdown(f"{title} | ms here | ms there | difference | calls here | calls there | kind", rows)
    return text


def _categories(axis: Any, shown: Sequence[Profile]) -> None:
    names = [name for name in CATEGORIES if any(name in p.by("category") for p in shown)]
    height = 0.8 / len(shown)
    for i, (p, colour, hatch) in enumerate(zip(shown, _COLOURS, ("", "//"), strict=False)):
        ms = [p.by("category").get(name, (0.0, 0.0))[0] for name in names]
        y = np.arange(len(names)) + height * (i - (len(shown) - 1) / 2)
        bars = axis.barh(y, ms, height, color=colour, hatch=hatch, edgecolor="white", linewidth=0.4, label=p.arm)
        axis.bar_label(bars, [f"{x:,.2f} ms, {100 * x / (p.ms or 1):.0f} %" for x in ms], padding=3, fontsize=7)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.set_xlabel("ms a step under the profiler (for proportions)")


def _memory(axis: Any, shown: Sequence[Profile]) -> None:
    for p, colour, style, order in zip(shown, _COLOURS, ("-", "--"), (3, 2), strict=False):
        mib = np.array(p.live) / 2**20
        top = int(mib.argmax())
        label = f"{p.arm}, peak {mib[top]:,.1f} MiB"
        axis.step(p.at_ms, mib, style, where="post", color=colour, linewidth=1.3, label=label, zorder=order)
        axis.plot(p.at_ms[top], mib[top], "o", color=colour, markeredgecolor="black", zorder=4)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.set_xlabel("ms within a step under the profiler")
    axis.set_ylabel("MiB live, the step's arguments included")
