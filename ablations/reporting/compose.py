"""The report of a study: report.md, report.html, tables, figures and TensorBoard, all made from its cells."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ablations.analysis.comparisons import Comparisons
from ablations.reporting import (
    cost_figures,
    effect_figures,
    html,
    learning_curves,
    profiles,
    published,
    sections,
    tensorboard,
)
from ablations.reporting.words import sentences
from ablations.study.reading import read
from ablations.study.store import write_text
from core.errors import InputError

Drawn = dict[str, Path]  # figures by name, in the report's order
_LISTING = ".written.json"  # what a report wrote, so that the next one may replace it and nothing else
_FOLDERS = ("figures", "profiles", "tensorboard")

CAPTIONS = {
    "effects": "Effects on each response. Thick: 95 % interval; thin: 95 % for all effects of a panel together; "
    "filled: zero is outside the thin one. Long ones run out of the panel. Dashed: interactions begin below.",
    "pareto": "Accuracy after the last epoch against step time and peak memory: means over seeds, bars ± standard "
    "deviation. Filled: no arm has better means in both, within noise or not. The line joins these.",
    "learning_curves": "Validation accuracy at equal steps, and at equal time: the baseline, each optimization alone "
    "and the arm with the highest mean. Bands: standard deviation over seeds.",
    "kept_bytes": "Bytes kept for the backward pass, by layer and operation.",
}


class Section(NamedTuple):
    """A part of a report: Markdown lines, then figures by name."""

    title: str
    lines: list[str]
    figures: Sequence[str] = ()


def write(folders: Sequence[Path], out: Path | None = None, target: float | None = None) -> list[Path]:
    """Write the report of a study, or of several joined, with its tables and figures; returns their paths.

    out: the folder; report/ in the study's own, or for several in one named after them. target: an accuracy from 0 to 1
    that the time to reach it is reported for; one that the baseline reached unless given. Raises InputError for what
    `reading.read` refuses, and for a target outside 0 to 1.
    """
    if target is not None and not 0 < target <= 1:
        raise InputError(f"target {100 * target:g} is outside 0 to 100 %: write an accuracy in percent, such as 90")
    own = folders[0] if len(folders) == 1 else folders[0].parent / "+".join(f.name for f in folders)
    return write_comparisons(Comparisons(read(folders)), out or own / "report", target)


def write_comparisons(comparisons: Comparisons, out: Path, target: float | None = None) -> list[Path]:
    """The same of cells that are read already, in this folder."""
    _ = comparisons.cells  # refused before anything is written
    out.mkdir(parents=True, exist_ok=True)
    with _replacing(out):
        drawn = _draw(comparisons, out)
        parts = _sections(comparisons, drawn, comparisons.target if target is None else target)
        text = _markdown(comparisons, parts, drawn, out)
        write_text(out / "report.md", text)
        write_text(out / "report.html", html.render(text, out))
        flat = [column for column in comparisons.cells if column not in comparisons.tables]
        comparisons.cells[flat].to_csv(out / "results.csv", index=False)
        comparisons.effect_table.to_csv(out / "effects.csv", index=False)
        told = {part.title: part.lines for part in parts}
        pages = profiles.write(profiles.profiled(comparisons.study), out / "profiles")
        tensorboard.write(out / "tensorboard", comparisons, told, drawn, pages)
    return [out / name for name in ("report.md", "report.html", "results.csv", "effects.csv")] + list(drawn.values())


@contextmanager
def _replacing(out: Path) -> Iterator[None]:
    """Removes what an earlier report wrote in a folder, and notes what this one writes."""
    listing = out / _LISTING
    for name in json.loads(listing.read_text()) if listing.is_file() else []:
        if (out / name).parent.resolve().is_relative_to(out.resolve()):
            (out / name).unlink(missing_ok=True)
    foreign = _files(out)
    try:
        yield
    finally:
        write_text(listing, json.dumps(sorted(_files(out) - foreign)))


def _files(out: Path) -> set[str]:
    return {p.relative_to(out).as_posix() for f in _FOLDERS for p in (out / f).rglob("*") if not p.is_dir()}


def _draw(comparisons: Comparisons, out: Path) -> Drawn:
    """All figures; those that a study has nothing for are left out."""
    folder, study = out / "figures", comparisons.study
    drawn: Drawn = {}

    def path(name: str) -> Path:
        return drawn.setdefault(name, folder / f"{name}.png")

    learning_curves.draw(comparisons, path("learning_curves"))
    cost_figures.kept(comparisons, path("kept_bytes"))
    if len(study.arms) > 1:
        cost_figures.pareto(comparisons, path("pareto"))
    if not comparisons.effect_table.empty:
        effect_figures.effects(comparisons, path("effects"))
    for arm, group in study.arms.items():
        source = group[0].folder / "tokens.png"
        if source.is_file() and all(source.read_bytes() != p.read_bytes() for n, p in drawn.items() if "tokens" in n):
            shutil.copyfile(source, path(f"tokens_{arm}"))
    return drawn


def _sections(comparisons: Comparisons, drawn: Drawn, target: float) -> list[Section]:
    """What a report has to say, in its order; empty sections left out."""
    study = comparisons.study
    records = [*study.results, *study.failed]
    beside = published.beside(study.configuration, study.environment, records)
    tokens = [name for name in drawn if name.startswith("tokens")]
    parts = [
        Section("Summary", [f"* {sentence}" for sentence in sentences(comparisons)]),
        Section("Arms", sections.arms(comparisons), ["pareto"]),
        Section("Effects", sections.effects(comparisons), ["effects"]),
        Section("Arms against the baseline", sections.against_baseline(comparisons, target)),
        Section("Optimizations against their controls", sections.against_controls(comparisons)),
        Section("Taken out of everything", sections.taken_out(comparisons)),
        Section("Beside the published study", beside),
        Section("Learning curves", [], ["learning_curves"]),
        Section("Memory", [], ["kept_bytes"]),
        Section("Tokens", ["How images are cut into patches."] if tokens else [], tokens),
        Section("How to read this", sections.reading(comparisons)),
        Section("Optimizations", sections.optimizations(comparisons)),
        Section("Failed cells", sections.failed(comparisons)),
        Section("Settings and environment", sections.environment(comparisons)),
    ]
    kept = [part._replace(figures=[name for name in part.figures if name in drawn]) for part in parts]
    return [part for part in kept if part.lines or part.figures]


def _markdown(comparisons: Comparisons, parts: Sequence[Section], drawn: Drawn, out: Path) -> str:
    configuration = comparisons.study.configuration
    lines = [f"# {configuration['preset']} on {configuration['data']}", "", sections.terms(comparisons)]
    for part in parts:
        lines += ["", f"## {part.title}", "", *part.lines]
        for name in part.figures:
            path = drawn[name].relative_to(out).as_posix()
            lines += ["", f"![{CAPTIONS.get(name, name.replace('_', ' '))}]({path})"]
    return "\n".join(lines) + "\n"
