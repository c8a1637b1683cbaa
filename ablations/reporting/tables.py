"""Sections of a report: tables and the words that go with them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import mean
from typing import Any

from ablations.analysis.comparisons import BY_NAME, COMPARED, RESPONSES, Views
from ablations.analysis.effects import label
from ablations.reporting.formatting import interval, spread, table
from ablations.study.arms import AGAIN, BASELINE
from ablations.study.recipes import PRESETS
from ablations.study.store import Result
from core.transforms.registry import REGISTRY

COLUMNS: dict[str, tuple[Callable[[Result], float], str]] = {
    "params": (lambda r: r["parameters"], ",.0f"),
    "best %": (lambda r: 100 * r["best_val_accuracy"], ".2f"),
    "final %": (lambda r: 100 * r["final_val_accuracy"], ".2f"),
    "val loss": (lambda r: r["final_val_loss"], ".3f"),
    "train loss": (lambda r: r["final_train_loss"], ".3f"),
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


def rows(arms: dict[str, list[Result]], brief: bool = False) -> tuple[list[str], list[list[str]]]:
    """Header and one row an arm: means over its seeds, with the standard deviation where there are several.

    brief: fewer columns, and the deviation of the accuracy alone, for a terminal of 80 characters.
    """
    shown = {title: column for title, column in COLUMNS.items() if not brief or title in BRIEF}
    header = ["arm", "seeds", *shown, *(RATIOS if BASELINE in arms else ())]
    out = []
    for name, group in arms.items():
        row = [name, str(len(group))]
        for title, (value, form) in shown.items():
            row.append(spread([value(r) for r in group], form, not brief or title == "best %"))
        if BASELINE in arms:
            row += [f"{_mean(group, key) / _mean(arms[BASELINE], key):.2f}" for key in RATIOS.values()]
        out.append(row)
    return header, out


def _mean(group: Sequence[Result], key: str) -> float:
    return mean(r[key] for r in group)


def by_arm(views: Views) -> dict[str, list[Result]]:
    """Results by arm."""
    return {arm: [cell.result for cell in cells] for arm, cells in views.study.arms.items()}


def arms(views: Views) -> list[str]:
    """Every arm's measurements."""
    return table(*rows(by_arm(views)))


def effects(views: Views) -> list[str]:
    """Main effects and interactions of every response."""
    found = views.effects
    terms = [effect.term for effect in found["accuracy"].effects]
    if not terms:
        return []
    shown = [(r, found[r.name].together, dict(found[r.name].effects)) for r in RESPONSES]
    body = [[f"`{label(term)}`", *(interval(r, of[term], k) for r, k, of in shown)] for term in terms]
    return [
        *table(["effect", *(_title(name) for name in BY_NAME)], body),
        "",
        f"A main effect is the mean of (with it - without it) over all settings of the others that it was run with; an "
        f"interaction (×) by how much one effect changes when the other is there. In brackets 95 % intervals that hold "
        f"together for all {len(terms)} effects of a column (Šidák); bold: zero is outside. Single intervals, standard "
        "errors and degrees of freedom are in effects.csv.",
    ]


def _title(name: str) -> str:
    unit = BY_NAME[name].unit
    return f"{name}, {unit}" if unit else name


def against_baseline(views: Views, target: float) -> list[str]:
    """Every arm beside the baseline: at equal steps, equal time and equal memory."""
    if not views.compared:
        return []
    others = [*([AGAIN] if AGAIN in views.study.arms else []), *views.compared]
    k, body = len(others), []
    for arm in (BASELINE, *others):
        found = {name: views.against(name, arm) for name in COMPARED}
        accuracy = found["accuracy"]
        reached, number = views.to_target(arm, target)
        equal_time = views.at_equal_time(arm)
        seeds = len(views.study.arms[arm])
        body.append(
            [
                f"`{arm}`",
                *("—" if arm == BASELINE else interval(BY_NAME[name], found[name], k) for name in found),
                f"{accuracy.above:.2f}" if accuracy and accuracy.se >= 0 and arm != BASELINE else "—",
                "—" if equal_time is None else f"{100 * equal_time:.2f}",
                f"{views.at_equal_memory(arm):,}",
                f"{reached:.1f}" + (f" ({number} of {seeds})" if number < seeds else "") if number else "never",
            ]
        )
    fastest, size = views.budget, views.study.configuration["batch_size"]
    headings = [*map(_title, COMPARED), "P(better)", "% at equal time"]
    lines = table(["arm", *headings, "batch at equal memory", f"s to {100 * target:.2f} %"], body)
    if BASELINE in views.apart:
        lines += ["", "The baseline is another model than these arms: the differences mix size and technique."]
    return [
        *lines,
        "",
        f"Differences from the baseline after the last epoch (equal steps), paired by seed and by image, with 95 % "
        f"intervals that hold together for the {k} arms of a column. P(better): that the true difference in accuracy "
        f"is above zero, each arm by itself. Equal time: accuracy after {fastest:.1f} s of training, which is all the "
        "fastest arm has had, between epochs interpolated, schedules as run. Equal memory: the batch whose predicted "
        f"peak is the baseline's at {size}. Last column: training seconds to the first epoch at an accuracy that the "
        "baseline reached at every seed, or that was asked for (--target); of several seeds the mean over those that "
        "reached it, with their number if some did not.",
    ]


def swaps(views: Views) -> list[str]:
    """Leave-one-out and add-one-in."""
    by_level = list(zip(*(views.swaps(name) for name in COMPARED), strict=True))
    if BASELINE not in views.study.arms or not any(s[0].added or s[0].removed for s in by_level):
        return []
    k = len(by_level)
    body = [
        [
            f"`{of[0].level}`",
            *(interval(BY_NAME[n], s.added, k) for n, s in zip(COMPARED, of, strict=True)),
            f"`{of[0].everything}`" if of[0].everything else "not run",
            *(interval(BY_NAME[n], s.removed, k) for n, s in zip(COMPARED, of, strict=True)),
        ]
        for of in by_level
    ]
    header = [
        "",
        *(f"added: {_title(n)}" for n in COMPARED),
        "everything",
        *(f"taken out: {_title(n)}" for n in COMPARED),
    ]
    return [
        *table(header, body),
        "",
        f"Added: the optimization alone minus the baseline. Taken out: everything without it minus everything, so what "
        f"pays in company is negative in accuracy there. Intervals hold together for the {k} rows of a column.",
    ]


def against_recomputation(views: Views) -> list[str]:
    """What sampling buys over its exact control, of what was measured."""
    present = views.study.arms
    sampled = [name for name in present if any(part.startswith("crs@") for part in name.split("+"))]
    if not sampled:
        return []
    lines = []
    for name in sampled:
        others = [part for part in name.split("+") if not part.startswith("crs@")]
        control = "+".join(sorted([*others, "recompute"]))
        if control in present:
            texts = [interval(BY_NAME[n], views.against(n, name, control)) for n in COMPARED]
            lines.append([f"`{name}`", f"`{control}`", *texts])
    if not lines:
        return ["No control was run: `--arms all,controls` adds `recompute`, which saves memory without any noise."]
    header = ["sampled", "recomputed", *map(_title, COMPARED)]
    return [*table(header, lines), "", "The first minus the second; single 95 % intervals."]


def terms(views: Views) -> str:
    """Recipe and machine in a sentence or two."""
    configuration, environment = views.study.configuration, views.study.environment
    preset = json.loads(json.dumps(asdict(PRESETS[configuration["preset"]])))
    changed = [
        f"{k} {preset[k]} -> {v}"
        for k, v in configuration.items()
        if k in preset and k not in ("set", "engine", "device") and preset[k] not in (v, "auto", None)
    ]
    overrides = f" Changed from the preset: {', '.join(changed)}." if changed else ""
    return (
        f"Preset {configuration['preset']}: {configuration['epochs']} epochs, batch {configuration['batch_size']}, "
        f"{configuration['precision']}, engine {configuration['engine']}, on {environment['device_name']} "
        f"({configuration['device']}), torch {environment['torch']}.{overrides}"
    )


def reading(views: Views) -> list[str]:
    """How to read the table of arms."""
    many = "Means over seeds ± standard deviation. " if len(views.study.seeds) > 1 else ""
    return [
        f"{many}best % and final %: validation accuracy, best epoch and last; effects and differences are of the last, "
        "because the best of several epochs is flattered by the choice. train loss: mean of the last epoch, penalty "
        "included; val loss: cross entropy after it. train s: training steps only, without evaluation, logging, "
        "warm-up and compilation. step ms: median; cells run one after another, so small differences can be the "
        "machine's drift (ablations/bench.py interleaves). peak MiB: parameters, optimizer state, batch and "
        "everything else alive at once in one training step, measured in a pass of its own; predicted: the same, "
        "accounted for without running it, for eager PyTorch; kept MiB: the part kept for the backward pass. MFU: the "
        "arm's own FLOPs a second over those of a large matrix product, measured as the cell ended. time × and peak "
        "×: step ms and peak MiB over the baseline's.",
        "",
        "Seeds share initial weights and data order between arms, so differences are taken within seeds, and within "
        "images for accuracy, before they are averaged. Intervals count the seeds and the validation images each as a "
        "sample of many (Student's quantile for seeds, the normal one for images). With one seed they are Lenth's.",
    ]


def optimizations(views: Views) -> list[str]:
    """What the arms' parts are, and what they promise."""
    used = {part.split("@")[0] for arm in views.study.arms for part in arm.split("+")}
    return [f"* `{name}`: {t.about}. Contract: {t.contract}." for name, t in REGISTRY.items() if name in used]


def failed(views: Views) -> list[str]:
    """Cells that failed, and why."""
    return [f"* {f['arm']}, seed {f['seed']}: {f['error']}" for f in views.study.failed]


def environment(views: Views) -> list[str]:
    """All settings and versions."""
    study: dict[str, Any] = {"configuration": views.study.configuration, "environment": views.study.environment}
    return ["```json", json.dumps(study, indent=2), "```"]
