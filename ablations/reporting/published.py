"""The two published studies that presets carry out anew: their figures (published.toml), ours beside them, what
differs."""

import json
import tomllib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from ablations.reporting.formatting import spread, table
from ablations.study.arms import BASELINE
from ablations.study.presets import PRESETS
from ablations.study.store import Result

FIGURES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
DATA: dict[str, str] = FIGURES["data"]
STUDY_1, STUDY_2 = FIGURES["study_1"], FIGURES["study_2"]
_NONE = ("—", "—")


def beside(configuration: dict[str, Any], environment: dict[str, str], finished: Sequence[Result]) -> list[str]:
    """Markdown lines: the published figures with ours beside them, and the terms that differ; [] for a preset that
    carries out no published study, and for data that it was not published on.

    configuration, environment: of study.json. finished: results, and the records (with `error`) of failed cells.
    """
    preset, data = configuration["preset"], configuration["data"]
    study = next((s for s in (STUDY_1, STUDY_2) if preset in s["presets"]), None)
    if study is None or data not in DATA:
        return []
    done, whole = configuration["epochs"], PRESETS[study["presets"][0]].epochs
    short = f"SHORT RUN: {done} of {whole} epochs" if done < whole else ""
    ours = "here, SHORT RUN" if short else "here"
    terms = [*_terms(configuration, environment, study), *study["notes"]]
    if study is STUDY_1:
        one_model = configuration["baseline_width"] is None and configuration["baseline_heads"] is None
        terms.insert(0, study["matched" if one_model else "unequal"])
    return [
        f"Here: {data}." + (f" **{short}**: our accuracies are not those of the whole run." if short else ""),
        "",
        *(_study_1 if study is STUDY_1 else _study_2)(finished, data, ours),
        "",
        "### Terms that differ from the published study",
        "",
        *(f"* {term}" for term in terms),
    ]


def _study_1(finished: Sequence[Result], data: str, ours: str) -> list[str]:
    """Time and accuracy of every published arm, and ours."""
    shown = DATA[data].removesuffix(" fine")
    baseline, _ = _cells(finished, BASELINE)
    rows = []
    for i, row in enumerate(STUDY_1["arms"], 1):
        group, missing = _cells(finished, row["arm"])
        time, accuracy = row.get(data, _NONE)
        mine = [missing] * 4
        if len(group):
            seconds = group["train_seconds"]
            unit, divisor = ("min", 60) if seconds.mean() >= 120 else ("s", 1)
            text = f"{spread(seconds / divisor, '.1f')} {unit}"
            multiple = f" = {seconds.mean() / baseline['train_seconds'].mean():.2f} T" if len(baseline) else ""
            mine = [
                f"{group['parameters'].iloc[0]:,}",
                f"T = {text}" if row["arm"] == BASELINE else text + multiple,
                f"{spread(100 * group['best_val_accuracy'], '.2f')} %",
                str(group["epochs"].iloc[0]),
            ]
        rows.append([str(i), row["model"], row["parameters"], time, accuracy, *mine])
    header = ["#", "arm", "published parameters", f"{shown} time", f"{shown} accuracy"]
    header += [f"{ours}: {what}" for what in ("parameters", "time", "accuracy", "epochs run")]
    return table(pd.DataFrame(rows, columns=header))


def _study_2(finished: Sequence[Result], data: str, ours: str) -> list[str]:
    """Accuracy, then memory, of every ratio and control, and ours after the column of its data set."""
    exact, _ = _cells(finished, BASELINE)
    accuracies: list[dict[str, str]] = []
    memory: list[dict[str, str]] = []
    for row in STUDY_2["arms"]:
        group, missing = _cells(finished, row["arm"])
        accuracy, peak = missing, missing
        if len(group):
            peaks = group["peak_bytes"] / 1e9
            accuracy, peak = spread(group["best_val_accuracy"], ".4f"), f"{spread(peaks, '.2f')} GB"
            if len(exact) and row["arm"] != BASELINE:
                peak += f" ({exact['peak_bytes'].mean() / 1e9 / peaks.mean():.1f}x)"
        for rows, i, mine in ((accuracies, 0, accuracy), (memory, 1, peak)):
            rows.append({"ratio": row["ratio"], **{DATA[d]: row.get(d, _NONE)[i] for d in DATA}, ours: mine})
    names = [*DATA.values()]
    names.insert([*DATA].index(data) + 1, ours)
    return [
        *("Validation accuracy:", "", *table(pd.DataFrame(accuracies)[["ratio", *names]])),
        *("", "Peak memory (in brackets the exact arm's over it):", ""),
        *table(pd.DataFrame(memory)[["ratio", *names]]),
    ]


def _cells(finished: Sequence[Result], arm: str) -> tuple[pd.DataFrame, str]:
    """An arm's results, and what stands for them where there are none."""
    rows = [r for r in finished if r["arm"] == arm]
    return pd.DataFrame([r for r in rows if "error" not in r]), "failed" if rows else "not run"


def _terms(configuration: dict[str, Any], environment: dict[str, str], study: dict[str, Any]) -> list[str]:
    """What differs by this study's configuration and machine."""
    side = configuration["image"]
    terms = [
        f"Machine: published on {study['hardware']}; here on {environment['device_name']} ({configuration['device']}), "
        f"{configuration['precision']}, engine {configuration['engine']}, torch {environment['torch']}: compare "
        "ratios, not seconds."
    ]
    if side != study["image"]:
        terms.append(f"Images: published at {study['image']} pixels, here at {side}.")
    changed = _changes(configuration, study)
    return [*terms, f"Values, preset `{study['presets'][0]}` -> here: {', '.join(changed)}."] if changed else terms


def _changes(configuration: dict[str, Any], study: dict[str, Any]) -> list[str]:
    """Values of the recipe that are not the published ones, machine, data and undecided ones apart."""
    apart = ("data", "image", "set", "device", "engine", "eps", "flip" if study is STUDY_2 else "")
    before = json.loads(json.dumps(asdict(PRESETS[study["presets"][0]])))
    out = [
        f"{k} {v} -> {configuration.get(k)}"
        for k, v in before.items()
        if k not in apart and v != "auto" and configuration.get(k) != v
    ]
    old, new = (dict(text.split("=", 1) for text in of["set"]) for of in (before, configuration))
    names = [k for k in old | new if k.split(".")[0] in study["transforms"] and old.get(k) != new.get(k)]
    return out + [f"{k} {old.get(k, 'unset')} -> {new.get(k, 'unset')}" for k in names]
