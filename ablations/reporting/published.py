"""The two published studies that this project carries out anew: their figures, ours beside them, what differs.

Study 1: eight arms on CIFAR (github.com/SamruddhiLahoti/ViTTrainingOptimizations, 2023). Study 2: column-row sampling
while fine-tuning an ImageNet ViT-B/16 (two write-ups).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from ablations.reporting.formatting import spread
from ablations.reporting.formatting import table as markdown
from ablations.study.arms import BASELINE
from ablations.study.recipes import PRESETS
from ablations.study.store import Result

_NONE = "—"


class Row(NamedTuple):
    """An arm of study 1 as published. parameters: N is the baseline's. cifar10, cifar100: time of the whole training
    (T is the baseline's) and best validation accuracy."""

    arm: str
    model: str
    parameters: str
    cifar10: tuple[str, str]
    cifar100: tuple[str, str] = (_NONE, _NONE)


STUDY_1 = (
    Row("baseline", "baseline", "N = 11.9 M", ("T = 31 min", "78.39 %"), ("T = 30.5 min", "45.72 %")),
    Row("decatt", "DeCAtt", "4.2 M = 0.35 N", ("26 min = 0.84 T", "80.31 %"), ("25.26 min = 0.83 T", "51.33 %")),
    Row("mrt", "MRT", "0.35 N", ("not given (stats: 6,592 s, 50 epochs)", "not given (stats: 76.70 %)")),
    Row("flash", "Flash", "0.35 N", ("20 min = 0.65 T", "79.19 %"), ("20 min = 0.65 T", "50.5 %")),
    Row("flash+mrt", "MRT + Flash", "0.35 N", ("stats: 6,381 s, 35 epochs", "stats: 75.18 %")),
    Row("decatt+flash", "DeCAtt + Flash", "0.35 N", ("20.5 min = 0.66 T", "79.62 %"), ("17.2 min = 0.56 T", "49.98 %")),
    Row("decatt+mrt", "DeCAtt + MRT", "0.35 N", (_NONE, "stats: 58.81 % at 30 epochs")),
    Row("decatt+flash+mrt", "DeCAtt + MRT + Flash", "0.35 N", (_NONE, "stats: 75.64 % at 43 epochs")),
)
DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100 fine", "cifar100-coarse": "CIFAR-100 coarse"}
STUDY_2 = {  # accuracy and memory by the names of DATA, in this order
    "baseline": ("1 (exact)", (("0.9901", "16.82 GB"), ("0.9162", "16.82 GB"), ("0.9641", "16.82 GB"))),
    "crs@0.5": ("0.5", (("0.9891", "13.90 GB (1.2x)"), ("0.9122", "14.11 GB (1.2x)"), ("0.9613", "14.11 GB (1.2x)"))),
    "crs@0.3": ("0.3", (("0.9760", "13.16 GB (1.3x)"), ("0.7242", "10.97 GB (1.5x)"), ("0.8249", "11.02 GB (1.5x)"))),
    "recompute": ("1 (control: exact recomputation)", ((_NONE, _NONE),) * 3),
    "bf16": ("1 (control: bf16)", ((_NONE, _NONE),) * 3),
}
DECATT_NOTE = (
    "The published DeCAtt arm computed something else: its A was the residual stream after block 3, cut into "
    'runs of 21 2/3 tokens as "heads", and its penalty sat on its floor. Its model had 3 heads against the '
    "6 of its baseline, so its published speed-up is not the loss's."
)
UNEQUAL_NOTE = (
    "As published, `baseline` is a larger model than the other arms (12.0 M parameters with 6 heads against 4.2 M with "
    "3); differences from it mix size and technique. The preset `matched` gives all arms one model."
)
_STUDY_1_NOTES = (
    DECATT_NOTE,
    "Published parameter counts, as printed: 11,965,642 (10 classes) and 11,983,012 (100) for the baseline, 4,197,994 "
    "and 4,206,724 for the others; with MRT 4,714,506, of which 341,792 are the scorer's. Ours leave the scorer out.",
    "Some published figures with MRT are from fewer than 50 epochs, as marked. Published seconds an epoch: baseline "
    "37.1, DeCAtt 31.2, Flash 23.8, MRT 131.8.",
    "Dropout here follows the attention projection, the MLP's GELU and the head's GELU, never the attention "
    "probabilities, which fused attention does not form.",
    "Our times are of training steps alone, without evaluation, logging and compilation.",
)
_STUDY_2_NOTES = (
    "The write-ups state no learning rate: ours, weight decay, schedule, clipping and augmentation are the preset's.",
    "Memory: what a ViT-B/16 keeps at batch 64 and 224 pixels in float32 predicts a peak of 10.3 GB exact, and 10.6 "
    "and 9.7 GB at ratios 0.5 and 0.3 of the stated scope (q, k and v sampled apart, both attention products), where "
    "samples of the attention matrix only add to the copy that the softmax keeps. The published figures are higher "
    "than this arithmetic and not consistent with the stated scope.",
    "Our memory is the peak of one training step, 1 GB = 10^9 bytes.",
)


MATCHED_NOTE = (
    "Here all arms are one model: their times and accuracies differ from the baseline's by technique alone. The "
    "published baseline is a larger model (12.0 M parameters against 4.2 M), which mixes size and technique."
)


class Study(NamedTuple):
    """What a published study ran on, its preset, the transforms whose settings are its terms, and notes on it."""

    preset: str
    hardware: str
    image: int
    transforms: tuple[str, ...]
    notes: tuple[str, ...]


_FIRST = Study("published", "V100 GPUs, PyTorch of 2023", 32, ("decatt", "flash", "mrt"), _STUDY_1_NOTES)
_SECOND = Study("finetune", "one A40 GPU", 224, ("crs",), _STUDY_2_NOTES)
STUDIES = {"published": _FIRST, "matched": _FIRST, "finetune": _SECOND}  # by preset


def tables(configuration: dict[str, Any], environment: dict[str, str], finished: Sequence[Result]) -> list[str]:
    """Markdown lines: the published figures with ours beside them, and the terms that differ; [] for a preset that
    carries out no published study.

    configuration, environment: of study.json. finished: results, and the records (with `error`) of failed cells.
    """
    preset, data = configuration["preset"], configuration["data"]
    if preset not in STUDIES:
        return []
    study, column = STUDIES[preset], _column(data)
    if study is _FIRST and column == "cifar100-coarse":
        column = "cifar10"  # it has no figures of 20 classes
    done, whole = configuration["epochs"], PRESETS[study.preset].epochs
    short = f"SHORT RUN: {done} of {whole} epochs" if done < whole else ""
    ours = "here, SHORT RUN" if short else "here"
    table = _study_1(finished, column, ours) if study is _FIRST else _study_2(finished, column, ours)
    terms = [*_terms(configuration, environment, study, column), *study.notes]
    if study is _FIRST:
        one_model = configuration["baseline_width"] is None and configuration["baseline_heads"] is None
        terms.insert(0, MATCHED_NOTE if one_model else UNEQUAL_NOTE)
    return [
        f"Here: {data}." + (f" **{short}**: our accuracies are not those of the whole run." if short else ""),
        "",
        *table,
        "",
        "### Terms that differ from the published study",
        "",
        *(f"* {term}" for term in terms),
    ]


def _column(data: str) -> str:
    """The published data set, of DATA, whose figures stand beside those of `data`."""
    path = data.removeprefix("folder:")
    if data in DATA:
        return data
    if path.endswith("@coarse"):
        return "cifar100-coarse"
    return "cifar100" if path != data and (Path(path).expanduser() / "coarse.json").is_file() else "cifar10"


def _study_1(finished: Sequence[Result], column: str, ours: str) -> list[str]:
    """Time and accuracy of every published arm, and ours."""
    shown = DATA[column].removesuffix(" fine")
    header = ["#", "arm", "published parameters", f"{shown} time", f"{shown} accuracy"]
    header += [f"{ours}: {what}" for what in ("parameters", "time", "accuracy", "epochs run")]
    baseline = [r["train_seconds"] for r in finished if r["arm"] == BASELINE and "error" not in r]
    rows = []
    for i, row in enumerate(STUDY_1):
        group, missing = _cells(finished, row.arm)
        time, accuracy = row.cifar100 if column == "cifar100" else row.cifar10
        cells = [missing] * 4
        if group:
            seconds = [r["train_seconds"] for r in group]
            multiple = f" = {mean(seconds) / mean(baseline):.2f} T" if baseline else ""
            text = spread([s / 60 for s in seconds], ".1f") if mean(seconds) >= 120 else spread(seconds, ".1f")
            text += " min" if mean(seconds) >= 120 else " s"
            cells = [
                f"{group[0]['parameters']:,}",
                f"T = {text}" if row.arm == BASELINE else text + multiple,
                spread([100 * r["best_val_accuracy"] for r in group], ".2f") + " %",
                str(group[0]["epochs"]),
            ]
        rows.append([str(i + 1), row.model, row.parameters, time, accuracy, *cells])
    return markdown(header, rows)


def _study_2(finished: Sequence[Result], column: str, ours: str) -> list[str]:
    """Accuracy, then memory, of every ratio and control, and ours after the column of the data set nearest to it."""
    at = [*DATA].index(column) + 1
    exact = [r["peak_bytes"] for r in finished if r["arm"] == BASELINE and "error" not in r]
    header = list(DATA.values())
    header.insert(at, ours)
    accuracies: list[list[str]] = []
    memory: list[list[str]] = []
    for arm, (ratio, figures) in STUDY_2.items():
        group, missing = _cells(finished, arm)
        accuracy, peak = missing, missing
        if group:
            peaks = [r["peak_bytes"] / 1e9 for r in group]
            accuracy, peak = spread([r["best_val_accuracy"] for r in group], ".4f"), f"{spread(peaks, '.2f')} GB"
            if exact and arm != BASELINE:
                peak += f" ({mean(exact) / 1e9 / mean(peaks):.1f}x)"
        for rows, i, mine in ((accuracies, 0, accuracy), (memory, 1, peak)):
            cells = [figure[i] for figure in figures]
            cells.insert(at, mine)
            rows.append([ratio, *cells])
    return [
        *("Validation accuracy:", "", *markdown(["ratio", *header], accuracies)),
        *("", "Peak memory (in brackets the exact arm's over it):", "", *markdown(["ratio", *header], memory)),
    ]


def _cells(finished: Sequence[Result], arm: str) -> tuple[list[Result], str]:
    """An arm's results, and what stands for them where there are none."""
    rows = [r for r in finished if r["arm"] == arm]
    return [r for r in rows if "error" not in r], "failed" if rows else "not run"


def _terms(configuration: dict[str, Any], environment: dict[str, str], study: Study, column: str) -> list[str]:
    """What differs by this study's configuration and machine."""
    data, side = configuration["data"], configuration["image"]
    terms = [
        f"Machine: published on {study.hardware}; here on {environment['device_name']} ({configuration['device']}), "
        f"{configuration['precision']}, engine {configuration['engine']}, torch {environment['torch']}: compare "
        "ratios, not seconds."
    ]
    if (data, side) != (column, study.image):
        terms.append(f"Data: published on {DATA[column]} at {study.image} pixels; here on {data} at {side} pixels.")
    changed = _changes(configuration, study)
    return [*terms, f"Values, preset `{study.preset}` -> here: {', '.join(changed)}."] if changed else terms


def _changes(configuration: dict[str, Any], study: Study) -> list[str]:
    """Values of the recipe that are not the published ones, machine, data and undecided ones apart."""
    apart = ("data", "image", "set", "device", "engine", "differentiator", "eps", "flip" if study is _SECOND else "")
    before = json.loads(json.dumps(asdict(PRESETS[study.preset])))
    out = [
        f"{k} {v} -> {configuration.get(k)}"
        for k, v in before.items()
        if k not in apart and v != "auto" and configuration.get(k) != v
    ]
    old, new = (dict(text.split("=", 1) for text in of["set"]) for of in (before, configuration))
    names = [k for k in old | new if k.split(".")[0] in study.transforms and old.get(k) != new.get(k)]
    return out + [f"{k} {old.get(k, 'unset')} -> {new.get(k, 'unset')}" for k in names]
