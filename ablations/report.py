"""What a study concludes: table, results.csv, report.md and figures, all rebuilt from its cells.

python ablations/report.py runs/NAME
"""

import csv
import io
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from PIL import Image

from ablations import figures, published
from ablations.arms import BASELINE
from ablations.presets import PRESETS
from ablations.record import Result, cell_folder, cells, failures, results, write_text
from core.errors import InputError
from core.transforms import REGISTRY

COLUMNS: dict[str, tuple[Callable[[Result], float], str]] = {
    "params": (lambda r: r["parameters"], ",.0f"),
    "best %": (lambda r: 100 * r["best_val_accuracy"], ".2f"),
    "final %": (lambda r: 100 * r["final_val_accuracy"], ".2f"),
    "loss": (lambda r: r["final_train_loss"], ".3f"),
    "train s": (lambda r: r["train_seconds"], ".1f"),
    "img/s": (lambda r: r["images_per_second"], ",.0f"),
    "step ms": (lambda r: r["step_ms_median"], ".1f"),
    "peak MiB": (lambda r: r["peak_bytes"] / 2**20, ",.0f"),
    "predicted": (lambda r: r["predicted_peak_bytes"] / 2**20, ",.0f"),
    "kept MiB": (lambda r: r["kept_bytes"] / 2**20, ",.0f"),
    "MFU": (lambda r: r["mfu"], ".2f"),
}
BRIEF = ("best %", "train s", "img/s", "peak MiB")
RATIOS = {"time ×": "step_ms_median", "peak ×": "peak_bytes"}


def by_arm(finished: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by arm: the baseline, then by number of optimizations and name."""
    names = sorted({r["arm"] for r in finished}, key=lambda name: (name != BASELINE, name.count("+"), name))
    return {name: [r for r in finished if r["arm"] == name] for name in names}


def table(finished: Sequence[Result], brief: bool = False) -> tuple[list[str], list[list[str]]]:
    """Header and one row an arm: means over its seeds, with the standard deviation where there are several.

    brief: fewer columns, and the deviation of the accuracy alone, for a terminal of 80 characters.
    """
    arms = by_arm(finished)
    shown = {title: column for title, column in COLUMNS.items() if not brief or title in BRIEF}
    header = ["arm", "seeds", *shown, *(RATIOS if BASELINE in arms else ())]
    rows = []
    for name, group in arms.items():
        row = [name, str(len(group))]
        for title, (value, form) in shown.items():
            row.append(_cell([value(r) for r in group], form, not brief or title == "best %"))
        if BASELINE in arms:
            row += [f"{_mean(group, key) / _mean(arms[BASELINE], key):.2f}" for key in RATIOS.values()]
        rows.append(row)
    return header, rows


def _mean(group: Sequence[Result], key: str) -> float:
    return mean(r[key] for r in group)


def _cell(values: list[float], form: str, spread: bool) -> str:
    centre = format(mean(values), form)
    return f"{centre} ± {format(stdev(values), form)}" if spread and len(set(values)) > 1 else centre


def write(out: Path) -> list[Path]:
    """Write results.csv, report.md and the figures of a study; returns their paths.

    Raises InputError if the folder holds no study, or none of its cells has finished.
    """
    if not (out / "study.json").is_file():
        raise InputError(f"'{out}' holds no study (no study.json); pass a folder that ablations/run.py wrote")
    finished = results(out)
    if not finished:
        raise InputError(f"'{out}' has no finished cell yet; run ablations/run.py --out {out} again")
    drawn = [out / "figures" / f"accuracy_by_{name}.png" for name in ("epoch", "second")]
    everything = list(cells(out))
    for path, x in zip(drawn, ("epoch", "seconds"), strict=True):
        figures.accuracy(everything, x, path)
    drawn.append(out / "figures" / "kept_bytes.png")
    figures.kept({name: group[0]["kept_by_op"] for name, group in by_arm(finished).items()}, drawn[-1])
    drawn += _pictures(out, finished)
    _tensorboard(out, drawn)
    write_text(out / "results.csv", _csv(finished))
    write_text(out / "report.md", _markdown(out, finished, drawn))
    return [out / "report.md", out / "results.csv", *drawn]


def _pictures(out: Path, finished: Sequence[Result]) -> list[Path]:
    """Each arm's picture of tokenized images, if its first seed has one, copied to figures/; equal ones once."""
    copied: list[Path] = []
    for arm, group in by_arm(finished).items():
        source = cell_folder(out, arm, group[0]["seed"]) / "tokens.png"
        if source.is_file() and all(source.read_bytes() != other.read_bytes() for other in copied):
            copied.append(out / "figures" / f"tokens_{arm}.png")
            shutil.copyfile(source, copied[-1])
    return copied


def _csv(finished: Sequence[Result]) -> str:
    text = io.StringIO()
    rows = [{key: value for key, value in r.items() if not isinstance(value, dict)} for r in finished]
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _markdown(out: Path, finished: Sequence[Result], drawn: Sequence[Path]) -> str:
    study = json.loads((out / "study.json").read_text())
    configuration, environment = study["configuration"], study["environment"]
    header, rows = table(finished)
    lines = [
        f"# {configuration['preset']} on {configuration['data']}",
        "",
        _terms(configuration, environment),
        "",
        "| " + " | ".join(header) + " |",
        "|" + " --- |" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        _reading(finished),
        *_against_recomputation(finished),
        *(line for path in drawn for line in ("", f"![{path.stem}]({path.relative_to(out).as_posix()})")),
        "",
        "## Arms",
        "",
        *(f"* `{name}`: {t.about}. Contract: {t.contract}." for name, t in REGISTRY.items() if _uses(finished, name)),
        *published.tables(configuration, environment, [*finished, *failures(out)]),
        *_failed(out),
        "",
        "## Settings and environment",
        "",
        "```json",
        json.dumps(study, indent=2),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _terms(configuration: dict[str, Any], environment: dict[str, str]) -> str:
    preset = json.loads(json.dumps(asdict(PRESETS[configuration["preset"]])))
    undecided = ("auto", None)
    changed = [
        f"{k} {preset[k]} -> {v}" for k, v in configuration.items() if k in preset and preset[k] not in (v, *undecided)
    ]
    overrides = f" Changed from the preset: {', '.join(changed)}." if changed else ""
    return (
        f"{configuration['epochs']} epochs, batch {configuration['batch_size']}, {configuration['precision']}, engine "
        f"{configuration['engine']}, on {environment['device_name']} ({configuration['device']}), torch "
        f"{environment['torch']}.{overrides}"
    )


def _reading(finished: Sequence[Result]) -> str:
    seeds = len({r["seed"] for r in finished})
    many = (
        f"Means over {seeds} seeds ± standard deviation." if seeds > 1 else "One seed: differences have no error bar."
    )
    return (
        f"{many} best % and final %: validation accuracy, best epoch and last. loss: mean training loss of the last "
        "epoch, penalty included. train s: training steps only, without evaluation, logging, warm-up and compilation. "
        "step ms: median; cells run one after another, so small differences can be the machine's drift "
        "(ablations/bench.py interleaves). peak MiB: parameters, optimizer state, batch and everything else alive at "
        "once in one training step, measured in a pass of its own; predicted: the same, accounted for without running "
        "it, for eager PyTorch; kept MiB: the part kept for the backward pass. MFU: the arm's own FLOPs a second over "
        "those of a large matrix product, measured as the cell ended. time × and peak ×: step ms and peak MiB "
        "over the baseline's."
    )


def _against_recomputation(finished: Sequence[Result]) -> list[str]:
    """What sampling buys over its exact control, of what was measured."""
    arms = by_arm(finished)
    sampled = [name for name in arms if "crs@" in name]
    lines = []
    for name in sampled:
        others = [part for part in name.split("+") if not part.startswith("crs@")]
        control = "+".join(sorted([*others, "recompute"]))
        if control in arms:
            peak, time = (_mean(arms[name], k) / _mean(arms[control], k) for k in ("peak_bytes", "step_ms_median"))
            points = 100 * (_mean(arms[name], "best_val_accuracy") - _mean(arms[control], "best_val_accuracy"))
            lines.append(f"* `{name}` against `{control}`: {peak:.2f} × peak, {time:.2f} × time, {points:+.2f} points.")
    if not sampled:
        return []
    if not lines:
        lines = ["No control was run: `--arms all,controls` adds `recompute`, which saves memory without any noise."]
    return ["", "## What sampling buys over exact recomputation", "", *lines]


def _tensorboard(out: Path, drawn: Sequence[Path]) -> None:
    """The figures as images of the run `report`."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(out / "report", ignore_errors=True)
    with SummaryWriter(str(out / "report")) as writer:
        for path in drawn:
            writer.add_image(path.stem, np.asarray(Image.open(path).convert("RGB")), 0, dataformats="HWC")


def _uses(finished: Sequence[Result], transform: str) -> bool:
    return any(part.split("@")[0] == transform for r in finished for part in r["arm"].split("+"))


def _failed(out: Path) -> list[str]:
    failed = failures(out)
    if not failed:
        return []
    return ["", "## Failed cells", "", *(f"* {f['arm']}, seed {f['seed']}: {f['error']}" for f in failed)]


def main() -> None:
    """The command: rebuild the reports of the folders named."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python ablations/report.py runs/NAME [runs/NAME …]")
    for name in sys.argv[1:]:
        try:
            paths = write(Path(name))
        except (InputError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        print("\n".join(map(str, paths)))


if __name__ == "__main__":
    main()
