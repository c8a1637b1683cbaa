"""Profiles as text and images, beside the baseline's: operations.md, categories.png, memory.png of each arm."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ablations.reporting import plotting
from ablations.study.arms import BASELINE
from ablations.study.profiling import CATEGORIES, Operation, Profile, difference, finished, load
from ablations.study.reading import Study
from ablations.study.store import write_text

_SHOWN = 25  # rows of a table
_COLOURS = (plotting.BLUE, plotting.GREY)


class Pages(NamedTuple):
    """What is told of an arm's profile: Markdown by title, images by name, the folder of the profile itself."""

    texts: dict[str, str]
    images: dict[str, Path]
    source: Path


def profiled(study: Study) -> dict[str, Path]:
    """The folders of the arms' profiles, of those that have one."""
    folders = {arm: cells[0].folder.parent / "profile" for arm, cells in study.arms.items()}
    return {arm: folder for arm, folder in folders.items() if finished(folder)}


def write(folders: Mapping[str, Path], out: Path, baseline: str = BASELINE) -> dict[str, Pages]:
    """Text and images of every arm, in a folder each, with its difference from the baseline if that is among them.
    InputError for a folder without a profile."""
    made = {arm: load(folder) for arm, folder in folders.items()}
    return {arm: _draw(made[arm], made.get(baseline), baseline, out / arm, folders[arm]) for arm in folders}


def _draw(made: Profile, reference: Profile | None, baseline: str, out: Path, source: Path) -> Pages:
    out.mkdir(parents=True, exist_ok=True)
    texts = {"operations": _operations_text(made), "difference": _difference_text(made, reference, baseline)}
    write_text(out / "operations.md", "\n".join(texts.values()))
    shown = [p for p in (made, reference if made.arm != baseline else None) if p]
    images = {}
    for name, draw in (("categories", _categories), ("memory", _memory)):
        figure, axis = plotting.pyplot().subplots(figsize=(7, 4.2), layout="constrained")
        draw(axis, shown)
        axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
        images[name] = out / f"{name}.png"
        plotting.save(figure, images[name])
    return Pages(texts, images, source)


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
