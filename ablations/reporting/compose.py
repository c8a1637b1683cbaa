"""The report of a study: report.md, report.html, tables, figures and TensorBoard, all made from its cells."""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError

from ablations.analysis.comparisons import Comparisons, compare
from ablations.analysis.verdicts import COLUMNS
from ablations.reporting import figures, html, plotting, profiles, published, sections, tensorboard
from ablations.reporting.figures import CAPTIONS, Drawn
from ablations.reporting.words import sentences
from ablations.study import claims, schema
from ablations.study.store import write_text
from core import files
from core.errors import InputError

_LISTING = ".written.json"  # what a report wrote, so that the next one may replace it and nothing else
_WRITING, _UNFINISHED = ".writing-", ".unfinished"  # where it writes, and what tells that it did not come to its end
_WRITTEN = ("report.md", "report.html", "verdicts.csv", "effects.csv", "results.csv")


class Section(NamedTuple):
    """A part of a report: Markdown lines, then figures by name."""

    title: str
    lines: list[str]
    figures: Sequence[str] = ()


def write(folders: Sequence[Path], out: Path | None = None, target: float | None = None) -> list[Path]:
    """Write the report of a study, or of several joined, with its tables and figures; returns their paths.

    out: the folder; report/ in the study's own, or for several in one named after them. target: an accuracy in percent
    that the time to reach it is reported for; one that the baseline reached unless given. Raises InputError for what
    `compare` refuses, and for a target outside 0 to 100.
    """
    if target is not None and not 0 < target <= 100:
        raise InputError(f"target {target} is outside 0 to 100 %: write an accuracy in percent, such as 90")
    whole = [Path(os.path.abspath(folder)) for folder in folders]  # of . too the name
    own = folders[0] if len(folders) == 1 else whole[0].parent / "+".join(f.name for f in whole)
    at = out or own / "report"
    for path in (full := Path(os.path.realpath(at)), *full.parents):
        if path.name == "cells" and (path.parent / "study.json").exists():
            raise InputError(f"'{at}' is among the cells of the study '{path.parent}'; pass another --out")
    comparisons = compare(folders)
    with alone(at):
        return write_comparisons(comparisons, at, None if target is None else target / 100, own=out is None)


def write_comparisons(comparisons: Comparisons, out: Path, target: float | None = None, own: bool = True) -> list[Path]:
    """The same of cells that are read already, in this folder. own: it is for reports alone; InputError if a file that
    no report wrote is in the way of another."""
    _ = comparisons.cells  # refused before anything is written
    with _replacing(out, own) as made, plotting.plain():
        drawn = figures.draw(comparisons, made / "figures")
        parts = _sections(comparisons, drawn, comparisons.target if target is None else target)
        text = _markdown(comparisons, parts, drawn, made)
        write_text(made / "report.md", text)
        write_text(made / "report.html", html.render(text, made))
        flat = [column for column in comparisons.cells if column not in comparisons.tables]
        comparisons.cells[flat].to_csv(made / "results.csv", index=False)
        comparisons.effect_table.to_csv(made / "effects.csv", index=False)
        comparisons.verdicts[COLUMNS].to_csv(made / "verdicts.csv", index=False)
        told = {part.title: part.lines for part in parts}
        pages = profiles.write(profiles.profiled(comparisons.study), made / "profiles")
        tensorboard.write(made / "tensorboard", comparisons, told, drawn, pages)
    return [out / name for name in _WRITTEN] + [out / path.relative_to(made) for path in drawn.values()]


@contextmanager
def alone(out: Path, wait: bool = True) -> Iterator[bool]:
    """Within, no other process writes a report in this folder; False where one does, unless it shall wait for that."""
    with claims.waited(out / ".report") if wait else claims.claimed(out / ".report") as mine:
        yield wait or mine is not None


@contextmanager
def _replacing(out: Path, own: bool) -> Iterator[Path]:
    """An empty folder; what is written there then takes the place of what an earlier report wrote in `out`, and of
    nothing else unless that is for reports alone."""
    files.folder(out)
    own = own and not out.is_symlink()
    for left in out.glob(f"{_WRITING}*"):  # by a process that was killed
        with suppress(OSError):
            if (left / _UNFINISHED).is_file() or not os.listdir(left):
                _clear(left)
    for left in out.glob(f".{_LISTING}.*.partial"):
        files.remove(left)
    made = Path(tempfile.mkdtemp(dir=out, prefix=_WRITING)).absolute()  # pandas takes ~ at its beginning for a home
    try:
        (made / _UNFINISHED).touch()
        yield made
        before, after = _listed(out), _files(made)
        placed = [*((name, own or name in before) for name in after), (_LISTING, True)]
        if foreign := next(filter(None, (_foreign(out, *of) for of in placed)), None):
            raise InputError(f"'{foreign}' is not of a report; move it, or pass another --out")
        write_text(out / _LISTING, json.dumps([*after, *before]))  # whatever ends this, it knows what is its own
        for name in before:
            parent, whole = os.path.realpath((out / name).parent), os.path.realpath(out)
            if Path(parent).is_relative_to(whole) and not os.path.isdir(out / name):
                (out / name).unlink(missing_ok=True)
        for name in after:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            _move(made / name, out / name)
        write_text(out / _LISTING, json.dumps(after))
    finally:
        _clear(made)


def _clear(made: Path) -> None:
    """Remove where a report was written: what tells that it is one goes last."""
    mark = made / _UNFINISHED
    for path in sorted(made.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        elif path != mark:
            path.unlink()
    mark.unlink(missing_ok=True)
    made.rmdir()


def _foreign(out: Path, name: str, own: bool) -> Path | None:
    """What is in the way of a report's file: another one, unless it is a report's own, or what is no folder in it."""
    for folder in Path(name).parents[:-1]:
        if os.path.lexists(out / folder) and (not os.path.isdir(out / folder) or os.path.islink(out / folder)):
            return out / folder
    path = out / name
    return path if os.path.isdir(path) or (os.path.lexists(path) and not own) else None


def _move(source: Path, to: Path) -> None:
    """A link goes on pointing to the same."""
    if source.is_symlink():
        target = os.path.relpath(source.parent / source.readlink(), to.parent)
        source.unlink()
        source.symlink_to(target)
    os.replace(source, to)


def _listed(out: Path) -> list[str]:
    """What a report wrote there; nothing where that is not told or damaged."""
    try:
        found = TypeAdapter(list[Annotated[str, Field(pattern=r"^[^\x00]+$")]]).validate_json(
            schema.content(out / _LISTING)
        )
    except (schema.Damaged, ValidationError):
        return []
    return [*found, *_WRITTEN]


def _files(out: Path) -> list[str]:
    paths = (path.relative_to(out).as_posix() for path in out.rglob("*") if not os.path.isdir(path))
    return sorted(path for path in paths if path != _UNFINISHED)


def _sections(comparisons: Comparisons, drawn: Drawn, target: float) -> list[Section]:
    """What a report has to say, in its order; empty sections left out."""
    study = comparisons.study
    beside = published.beside(study.configuration, study.environment, [*study.results, *study.failed])
    tokens = [name for name in drawn if name.startswith("tokens")]
    parts = [
        Section("Verdicts", sections.verdicts(comparisons)),
        Section("What this rests on", [f"* {sentence}" for sentence in sentences(comparisons)]),
        Section("Arms", sections.arms(comparisons), ["pareto"]),
        Section("Effects", sections.effects(comparisons), ["effects"]),
        Section("Arms against the baseline", sections.against_baseline(comparisons, target)),
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
