"""The tables of a report, and the words that go with them."""

import json
from dataclasses import asdict
from typing import Any

import pandas as pd

from ablations.analysis.comparisons import Comparisons
from ablations.analysis.factors import levels
from ablations.analysis.responses import BY_NAME
from ablations.reporting.formatting import by_response, spread, table
from ablations.study.arms import BASELINE
from ablations.study.presets import PRESETS
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
BRIEF = ("best %", "train s", "img/s", "peak MiB")
RATIOS = {"time ×": "step_ms_median", "peak ×": "peak_bytes"}


def measurements(comparisons: Comparisons, brief: bool = False) -> pd.DataFrame:
    """A row an arm: means over its seeds, with the standard deviation where there are several.

    brief: fewer columns, and the deviation of the accuracy alone, for a terminal of 80 characters.
    """
    groups = comparisons.cells.groupby("arm")
    arms = list(comparisons.study.arms)
    out = pd.DataFrame({"arm": arms, "seeds": groups.size()[arms].astype(str).values})
    for name, (key, divisor, form) in COLUMNS.items():
        if name in BRIEF or not brief:
            deviation = not brief or name == "best %"
            out[name] = [spread(groups.get_group(arm)[key] / divisor, form, deviation) for arm in arms]
    if BASELINE in arms:
        for name, key in RATIOS.items():
            means = groups[key].mean()
            out[name] = (means / means[BASELINE])[arms].map("{:.2f}".format).values
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
        "interaction (×) by how much one effect changes when the other is there. In brackets 95 % intervals that hold "
        f"together for all {len(shown)} effects of a column (Šidák); bold: zero is outside. Single intervals, standard "
        "errors and degrees of freedom are in effects.csv.",
    ]


def against_baseline(comparisons: Comparisons, target: float) -> list[str]:
    """Every arm beside the baseline: at equal steps, equal memory, and on the way to a target."""
    frame = comparisons.against_baseline
    if frame.empty:
        return []
    arms = list(dict.fromkeys(frame["arm"]))
    shown = by_response(frame, ["arm"])
    accuracy = frame[frame["response"] == "accuracy"].set_index("arm")["confidence_above"]
    shown["confidence"] = accuracy[arms].map("{:.2f}".format).replace("nan", "—").values
    shown["batch at equal memory"] = [f"{comparisons.at_equal_memory(arm):,}" for arm in arms]
    shown[f"s to {100 * target:.2f} %"] = [_to_target(comparisons, arm, target) for arm in arms]
    lines = table(shown)
    if comparisons.baseline_differs:
        lines += ["", "The baseline is another model than these arms: the differences mix size and technique."]
    return [
        *lines,
        "",
        f"Differences from the baseline after the last epoch (equal steps), paired by seed and by image, with 95 % "
        f"intervals that hold together for the {len(arms)} arms of a column. Confidence: that the true difference in "
        "accuracy is above zero, each arm by itself. Equal memory: the batch whose predicted peak is the baseline's at "
        f"{comparisons.study.configuration['batch_size']}. Last column: training seconds to the first epoch at an "
        "accuracy that the baseline reached at every seed, or that was asked for (--target); where some seeds did not "
        "reach it in their epochs, the mean over those that did, which is then too low, and how many did.",
    ]


def _to_target(comparisons: Comparisons, arm: str, target: float) -> str:
    reached, number = comparisons.to_target(arm, target)
    seeds = len(comparisons.study.arms[arm])
    return "never" if not number else f"{reached:.1f}" + (f" ({number} of {seeds})" if number < seeds else "")


def taken_out(comparisons: Comparisons) -> list[str]:
    """What each optimization is worth in company."""
    frame = comparisons.taken_out
    if frame.empty:
        return []
    return [
        *table(by_response(frame, ["optimization", "everything"])),
        "",
        "Everything without the optimization minus everything: what pays in company is negative in accuracy here. "
        "Intervals hold together for the rows of a column.",
    ]


def against_controls(comparisons: Comparisons) -> list[str]:
    """What each optimization buys over the simpler one that it must beat, of what was measured."""
    frame = comparisons.against_controls
    if frame.empty:
        used = {factor for arm in comparisons.study.arms for factor in levels(arm)}
        wanted = [f"`{t.control}` for `{name}`" for name, t in REGISTRY.items() if name in used and t.control]
        return [f"No control was run: `--arms all,controls` adds {', '.join(wanted)}."] if wanted else []
    return [
        *table(by_response(frame, ["optimization", "arm", "control"])),
        "",
        "The arm minus the one with the optimization's control in its place; intervals hold together for the rows of a "
        "column.",
    ]


def terms(comparisons: Comparisons) -> str:
    """Recipe and machine in a sentence or two."""
    configuration, environment = comparisons.study.configuration, comparisons.study.environment
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


def reading(comparisons: Comparisons) -> list[str]:
    """How to read the table of arms."""
    many = "Means over seeds ± standard deviation. " if len(comparisons.study.seeds) > 1 else ""
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
        "sample of many (Student's quantile for seeds, the normal one for images).",
    ]


def optimizations(comparisons: Comparisons) -> list[str]:
    """What the arms' parts are, and what they promise."""
    used = {factor for arm in comparisons.study.arms for factor in levels(arm)}
    return [f"* `{name}`: {t.about}. Contract: {t.contract}." for name, t in REGISTRY.items() if name in used]


def failed(comparisons: Comparisons) -> list[str]:
    """Cells that failed, and why."""
    return [f"* {f['arm']}, seed {f['seed']}: {f['error']}" for f in comparisons.study.failed]


def environment(comparisons: Comparisons) -> list[str]:
    """All settings and versions."""
    study: dict[str, Any] = {
        "configuration": comparisons.study.configuration,
        "environment": comparisons.study.environment,
    }
    return ["```json", json.dumps(study, indent=2), "```"]
