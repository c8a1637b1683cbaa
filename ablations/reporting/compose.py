"""What a study concludes: report.md, report.html, tables and figures, all rebuilt from its cells.

python ablations/report.py runs/NAME [runs/NAME …]
"""

import csv
import io
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ablations.analysis.comparisons import RESPONSES, Views
from ablations.analysis.effects import label
from ablations.reporting import effect_figures as figures_effects
from ablations.reporting import figures, published
from ablations.reporting import html as page
from ablations.reporting import tables as sections
from ablations.reporting import tensorboard as boards
from ablations.reporting.words import sentences
from ablations.study.reading import read
from ablations.study.store import write_text
from core.errors import InputError

Drawn = dict[str, Path]  # figures by name, in the report's order


def write(folders: Sequence[Path], out: Path | None = None, target: float | None = None) -> list[Path]:
    """Write the report of a study, or of several joined, with its tables and figures; returns their paths.

    out: the folder; the study's own, or for several one named after them. target: an accuracy from 0 to 1 that the
    time to reach it is reported for; one that the baseline reached unless given. Raises InputError for what
    `cells.read` refuses, and for a target outside 0 to 1.
    """
    if target is not None and not 0 < target <= 1:
        raise InputError(f"target {100 * target:g} is outside 0 to 100 %: write an accuracy in percent, such as 90")
    out = out or (folders[0] if len(folders) == 1 else folders[0].parent / "+".join(f.name for f in folders))
    return compose(Views(read(folders)), out, target)


def compose(views: Views, out: Path, target: float | None = None) -> list[Path]:
    """The same of cells that are read already, in this folder."""
    _ = views.tables  # refused before anything is written
    out.mkdir(parents=True, exist_ok=True)
    drawn = _draw(views, out)
    parts = _sections(views, drawn, views.target if target is None else target)
    text = _markdown(views, parts, drawn, out)
    write_text(out / "report.md", text)
    write_text(out / "report.html", page.render(text, out))
    write_text(out / "results.csv", _csv([_flat(result) for result in views.study.results]))
    write_text(out / "effects.csv", _csv(_effects(views)))
    boards.write(out / "report", views, {title: lines for title, _, lines, _ in parts}, drawn)
    return [out / name for name in ("report.md", "report.html", "results.csv", "effects.csv")] + list(drawn.values())


def _draw(views: Views, out: Path) -> Drawn:
    """All figures; those that a study has nothing for are left out."""
    folder = out / "figures"
    shutil.rmtree(folder, ignore_errors=True)
    cells = [(cell.result, cell.rows) for cell in views.study.cells]
    drawn: Drawn = {}
    for name, x in (("accuracy_by_epoch", "epoch"), ("accuracy_by_second", "seconds")):
        drawn[name] = folder / f"{name}.png"
        figures.accuracy(cells, x, drawn[name])
    drawn["kept_bytes"] = folder / "kept_bytes.png"
    figures.kept({arm: group[0]["kept_by_op"] for arm, group in sections.by_arm(views).items()}, drawn["kept_bytes"])
    drawn |= figures_effects.draw(views, folder)
    for arm, group in views.study.arms.items():
        source = group[0].folder / "tokens.png"
        if source.is_file() and all(source.read_bytes() != p.read_bytes() for n, p in drawn.items() if "tokens" in n):
            drawn[f"tokens_{arm}"] = folder / f"tokens_{arm}.png"
            shutil.copyfile(source, drawn[f"tokens_{arm}"])
    return drawn


Section = tuple[str, str, list[str], list[str]]  # title, words before, lines, figures after


def _sections(views: Views, drawn: Drawn, target: float) -> list[Section]:
    """What a report has to say, in its order; empty sections left out."""
    study = views.study
    records = [*study.results, *study.failed]
    beside = published.tables(study.configuration, study.environment, records)
    tokens = [name for name in drawn if name.startswith("tokens")]
    parts: list[Section] = [
        ("Summary", "", [f"* {sentence}" for sentence in sentences(views)], []),
        ("Arms", "", sections.arms(views), ["pareto"]),
        (
            "Effects",
            "",
            sections.effects(views),
            ["effects", "half_normal", *(f"interactions_{r.name.replace(' ', '_')}" for r in RESPONSES)],
        ),
        ("Arms against the baseline", "", sections.against_baseline(views, target), []),
        ("Added to the baseline, taken out of everything", "", sections.swaps(views), []),
        ("Sampling against exact recomputation", "", sections.against_recomputation(views), []),
        ("Beside the published study", "", beside, []),
        ("Learning curves", "Validation accuracy at equal steps, and at equal time.", [], [*drawn][:2]),
        ("Memory", "What each arm keeps for its backward pass.", [], ["kept_bytes"]),
        ("Tokens", "How images are cut into patches.", [], tokens),
        ("How to read this", "", sections.reading(views), []),
        ("Optimizations", "", sections.optimizations(views), []),
        ("Failed cells", "", sections.failed(views), []),
        ("Settings and environment", "", sections.environment(views), []),
    ]
    kept = [(title, words, lines, [name for name in names if name in drawn]) for title, words, lines, names in parts]
    return [part for part in kept if part[2] or part[3]]


def _markdown(views: Views, parts: Sequence[Section], drawn: Drawn, out: Path) -> str:
    configuration = views.study.configuration
    lines = [f"# {configuration['preset']} on {configuration['data']}", "", sections.terms(views)]
    for title, words, body, names in parts:
        lines += ["", f"## {title}", ""]
        lines += [words, ""] if words else []
        lines += body
        for name in names:
            path = drawn[name].relative_to(out).as_posix()
            lines += ["", f"![{figures_effects.CAPTIONS.get(name, name.replace('_', ' '))}]({path})"]
    return "\n".join(lines) + "\n"


def _flat(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if not isinstance(value, dict)}


def _effects(views: Views) -> list[dict[str, Any]]:
    """All effects with both intervals. Step time and peak memory are differences of natural logarithms."""
    out = []
    for response, found in views.effects.items():
        for term, e in found.effects:
            (low, high), (low_all, high_all) = e.interval(), e.interval(of=found.together)
            row: dict[str, Any] = {"response": response, "effect": label(term), "estimate": e.value}
            row |= {"se": e.se, "df": e.df, "seeds": e.seeds, "low": low, "high": high}
            out.append(row | {"low_together": low_all, "high_together": high_all})
    return out


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@dataclass(frozen=True)
class Command:
    """Rebuild the report of a study from its cells, or join several of one configuration."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Studies that run.py wrote, such as runs/quick-digits."""
    out: Path | None = None
    """Where the report goes: the study's folder, or for several studies one named after them."""
    target: float | None = None
    """Accuracy in percent to report the time to; one that the baseline reached unless given."""


def main() -> None:
    """Exit status: 0, or 2 for bad input."""
    command: Annotated[Command, tyro.conf.arg(name="")] = tyro.cli(Command)
    try:
        if not command.folders:
            raise InputError("no study given; write python ablations/report.py runs/NAME")
        paths = write(command.folders, command.out, None if command.target is None else command.target / 100)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print("\n".join(map(str, paths)))


if __name__ == "__main__":
    main()
