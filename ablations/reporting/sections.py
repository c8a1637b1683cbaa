"""The tables of a report, and the words that go with them."""

import json
from dataclasses import asdict
from itertools import takewhile
from math import inf, isnan
from typing import Any

import numpy as np
import pandas as pd

from ablations.analysis.comparisons import Comparisons
from ablations.analysis.factors import control_of, levels
from ablations.analysis.responses import BY_NAME, COMPARED
from ablations.analysis.verdicts import AGAINST_CONTROL, of_optimization
from ablations.reporting.formatting import by_response, judged, spread, table, title, verbatim
from ablations.reporting.words import pays, sure
from ablations.study.arms import BASELINE
from ablations.study.presets import PRESETS
from ablations.study.recipes import EQUAL
from core.transforms.registry import REGISTRY

COLUMNS: dict[str, tuple[str, float, str]] = {  # of a result: key, divisor, form
    "params": ("parameters", 1, ",.0f"),
    "best %": ("best_val_accuracy", 0.01, ".2f"),
    "final %": ("final_val_accuracy", 0.01, ".2f"),
    "val loss": ("final_val_loss", 1, ".3f"),
    "train loss": ("final_train_loss", 1, ".3f"),
    "train s": ("train_seconds", 1, ".1f"),
    "img/s": ("images_per_second", 1, ",.0f"),
    "step ms": ("step_ms_median", 1, ".1f"),
    "peak MiB": ("peak_bytes", 2**20, ",.0f"),
    "predicted": ("predicted_peak_bytes", 2**20, ",.0f"),
    "kept MiB": ("kept_bytes", 2**20, ",.0f"),
    "MFU": ("mfu", 1, ".2f"),
}
_DECIDED = ("image", "patch", "flip", "eps", "processes")  # where a preset leaves them open: by data, weights, command
_LEARNED = ("best_val_accuracy", "final_val_accuracy", "final_val_loss", "final_train_loss")


def verdict_table(comparisons: Comparisons) -> pd.DataFrame:
    """The first screen, as text: a row an optimization with its verdicts, and one with those against its control."""
    out = []
    for name, rows in of_optimization(comparisons.verdicts):
        for what, suffix in ((f"`{name}`", ""), (f"`{name}` against `{control_of(name)}`", AGAINST_CONTROL)):
            found = {title(r): judged(rows[r + suffix]) for r in COMPARED if r + suffix in rows}
            if found:
                out.append({"optimization": what, **{title(r): "—" for r in COMPARED}, **found})
    return pd.DataFrame(out)


def verdicts(comparisons: Comparisons) -> list[str]:
    """The first screen: the table, what it means, and a sentence an optimization."""
    shown = verdict_table(comparisons)
    if shown.empty:
        return []
    looks = comparisons.looks
    stopping = f" Training might have stopped at {looks} numbers of seeds: intervals allow for it." if looks > 1 else ""
    return [
        *table(shown),
        "",
        f"Mean effect of each optimization over the settings of the others. In brackets {sure(comparisons)} intervals "
        "that hold together for a column. Better and worse: zero is outside; no worse: whatever is worse by the margin "
        f"is outside.{stopping}",
        "",
        *(f"* {sentence}" for sentence in pays(comparisons)),
    ]


def measurements(comparisons: Comparisons) -> pd.DataFrame:
    """A row an arm: means over its cells, with the standard deviation where there are several; accuracy of its twin."""
    groups = comparisons.cells.groupby("arm")
    arms = list(comparisons.study.arms)
    out = pd.DataFrame({"arm": arms, "seeds": groups.size()[arms].astype(str).values})
    for name, (key, divisor, form) in COLUMNS.items():
        of = comparisons.twins if key in _LEARNED else {arm: arm for arm in arms}
        out[name] = [spread(groups.get_group(of[arm])[key] / divisor, form) for arm in arms]
    for name, response in (("time ×", "step time"), ("peak ×", "peak memory")):
        ratios = np.exp(comparisons.means[response] - comparisons.means[response].get(BASELINE, np.nan))
        out[name] = ["—" if isnan(ratio) else f"{ratio:.2f}" for ratio in ratios[arms]]
    return out


def arms(comparisons: Comparisons) -> list[str]:
    """Every arm's measurements."""
    return table(measurements(comparisons))


def effects(comparisons: Comparisons) -> list[str]:
    """Main effects and interactions of every response."""
    frame = comparisons.effect_table
    if frame.empty:
        return []
    shown = by_response(frame, ["effect"], BY_NAME)
    return [
        *table(shown),
        "",
        "A main effect is the mean of (with it - without it) over all settings of the others that it was run with; an "
        f"interaction (×) by how much one effect changes when the other is there. In brackets {sure(comparisons)} "
        "intervals that hold together for the main effects of a column, and for its interactions (Šidák); bold: zero "
        "is outside. Single intervals, standard errors and degrees of freedom are in effects.csv.",
    ]


def against_baseline(comparisons: Comparisons, target: float) -> list[str]:
    """Every arm beside the baseline: at equal steps, and on the way to a target."""
    frame = comparisons.against_baseline
    if frame.empty:
        return []
    arms = list(dict.fromkeys(frame["arm"]))
    shown = by_response(frame, ["arm"])
    times = [comparisons.to_target(arm, target) for arm in arms]
    shown[f"s to {100 * target:.2f} %"] = ["not reached" if time == inf else f"{time:.1f}" for time in times]
    lines = table(shown)
    if comparisons.baseline_differs:
        lines += ["", "The baseline is another model than these arms: the differences mix size and technique."]
    return [
        *lines,
        "",
        f"Differences from the baseline after the last epoch (equal steps), with {sure(comparisons)} intervals that "
        f"hold together for the {len(arms)} arms of a column. Last column: median over an arm's own seeds (an exact "
        "one has the first alone) of the training seconds to the first epoch at an accuracy that the baseline reached "
        "at every seed, or that was asked for (--target); not reached: by half of the seeds.",
    ]


def terms(comparisons: Comparisons) -> str:
    """Recipe and machine in a sentence or two."""
    configuration, environment = comparisons.study.configuration, comparisons.study.environment
    preset = json.loads(json.dumps(asdict(PRESETS[configuration["preset"]])))
    changed = [
        f"{k} {preset[k]} -> {v}"
        for k, v in configuration.items()
        if k in preset
        and k not in ("set", "engine", "device")
        and preset[k] not in (v, "auto")
        and not (preset[k] is None and k in _DECIDED)
    ]
    decided = takewhile(lambda setting: setting.partition("=")[0] in EQUAL, configuration["set"][: len(EQUAL)])
    known = {*preset["set"], *decided}
    changed += [setting for setting in configuration["set"] if setting not in known]
    overrides = f" Changed from the preset: {', '.join(changed)}." if changed else ""
    return (
        f"Preset {configuration['preset']}: {configuration['epochs']} epochs, batch {configuration['batch_size']}, "
        f"{configuration['precision']}, engine {configuration['engine']}, on {environment['device_name']} "
        f"({configuration['device']}), torch {environment['torch']}.{overrides}"
    )


def reading(comparisons: Comparisons) -> list[str]:
    """How to read the table of arms, and how intervals are made."""
    many = "Means over seeds ± standard deviation. " if len(comparisons.study.seeds) > 1 else ""
    return [
        f"{many}best % and final %: validation accuracy, best epoch and last; effects and differences are of the last, "
        "because the best of several epochs is flattered by the choice. train loss: penalty included. Of exact arms "
        "accuracies and losses are their twins'. train s: training steps only. step ms: median of the cell, minutes "
        "apart from the others and so not compared; time ×: over the baseline's, from the timing pass. peak MiB: "
        "everything alive at once in a training step; predicted: accounted without running it, for eager PyTorch; kept "
        "MiB: the part kept for the backward pass; peak ×: over the baseline's. MFU: FLOPs a second over those of a "
        "large matrix product.",
        "",
        "Seeds share initial weights and data order between arms, so differences are taken within seeds. Seeds are a "
        "sample of many, and so are validation images where all seeds share them (Student's quantile for seeds, the "
        "normal one for images); variances over seeds are moderated by those of the other effects (Smyth 2004). Step "
        "time: differences of logarithms within each round of the timing pass, each arm's highest and lowest fifth "
        "drawn in (Dixon and Tukey 1968). Peak memory is the same at every run.",
    ]


def optimizations(comparisons: Comparisons) -> list[str]:
    """What the arms' parts are, and what they promise."""
    used = {factor for arm in comparisons.study.arms for factor in levels(arm)}
    return [f"* `{name}`: {t.about}. Contract: {t.contract}." for name, t in REGISTRY.items() if name in used]


def failed(comparisons: Comparisons) -> list[str]:
    """Cells that failed, and why."""
    return [f"* {f['arm']}, seed {f['seed']}: {verbatim(f['error'])}" for f in comparisons.study.failed]


def environment(comparisons: Comparisons) -> list[str]:
    """All settings and versions."""
    study: dict[str, Any] = {
        "configuration": comparisons.study.configuration,
        "environment": comparisons.study.environment,
    }
    return ["```json", json.dumps(study, indent=2), "```"]
