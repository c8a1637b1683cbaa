"""A study in TensorBoard: a run an arm, and one, `report`, with the report's tables as texts and its figures."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ablations.analysis.comparisons import Comparisons
from ablations.analysis.factors import levels
from ablations.reporting.formatting import listed
from ablations.reporting.profiles import Pages
from ablations.study.arms import BASELINE

RUNS = 40  # of more, TensorBoard 2.21 ticks none
CURVES = {  # of an epoch: the tag here, the factor
    "val/accuracy": ("accuracy/validation, %", 100.0),
    "val/loss": ("loss/validation", 1.0),
    "train/loss": ("loss/training", 1.0),
    "speed/images_per_second": ("speed/images a second in the cells", 1.0),
}
_TIME, _RATE = "cost/1 step time, ms", "cost/2 images a second"
_RATIO = "cost/6 step time over the baseline's"
_OF_CELLS = " (of the cells, not interleaved)"
_MEMORY = {"cost/3 peak memory, MiB": "peak_bytes", "cost/4 peak memory predicted, MiB": "predicted_peak_bytes"}
_MEMORY |= {"cost/5 kept for the backward pass, MiB": "kept_bytes"}


def write(
    folder: Path,
    comparisons: Comparisons,
    texts: Mapping[str, Sequence[str]],
    drawn: Mapping[str, Path],
    profiles: Mapping[str, Pages],
) -> None:
    """The run of the report with texts (Markdown by title) and figures, and a run an arm with its curves, costs and
    HParams and what was profiled of it; of more than 39 arms the first: the baseline, each alone, pairs, …"""
    from torch.utils.tensorboard import SummaryWriter

    arms = list(comparisons.study.arms)
    shown, left = arms[: RUNS - 1], arms[RUNS - 1 :]
    with SummaryWriter(str(folder / "report")) as writer:
        writer.add_custom_scalars(_layout(comparisons))
        about = [f"Left out, since TensorBoard ticks at most {RUNS} runs: {listed(left)}."] if left else []
        for i, (title, lines) in enumerate(({"Arms that are not runs": about} | dict(texts)).items()):
            if lines:
                writer.add_text(f"{i:02} {title}", "\n".join(lines), 0)  # TensorBoard sorts them
        for name, path in drawn.items():
            writer.add_image(name, _pixels(path), 0, dataformats="HWC")
    for arm in shown:
        with SummaryWriter(str(folder / arm)) as writer:
            _arm(writer, comparisons, arm)
            if arm in profiles:
                _profile(writer, profiles[arm], folder / arm)


def _arm(writer: Any, comparisons: Comparisons, arm: str) -> None:
    """An arm's curves with their bands, its costs as level lines, and its row of HParams."""
    from torch.utils.tensorboard.summary import hparams

    for key, (tag, factor) in CURVES.items():
        mean, deviation = comparisons.curve(arm if key.startswith("speed") else comparisons.twins[arm], key)
        for of, band in zip((tag, *_ends(tag)), (mean, mean - deviation, mean + deviation), strict=True):
            for epoch, value in enumerate(factor * band, start=1):
                writer.add_scalar(of, value, epoch)
    last = len(mean)
    costs = _costs(comparisons, arm)
    for tag, value in costs.items():
        for epoch in {0, last}:
            writer.add_scalar(tag, value, epoch)
    metrics = [CURVES["val/accuracy"][0], *(tag for tag in costs if tag.startswith("cost/") and tag != _RATIO)]
    # One column of settings: TensorBoard puts them before the metrics, and the arm's name tells them.
    for summary in hparams({"optimizations": len(levels(arm))}, dict.fromkeys(metrics, 0.0)):
        writer._get_file_writer().add_summary(summary)


def _costs(comparisons: Comparisons, arm: str) -> dict[str, float]:
    """Step time, images a second and bytes by tag. Step time is the baseline's in its cells times the ratio of the
    timing pass, where there is one, with the ends of its interval; else the cells' own, named so."""
    numbers, times = comparisons.cells.groupby("arm").mean(numeric_only=True), comparisons.times
    ratio = [*times.loc[arm]] if arm in times.index else []
    out = {}
    if ratio:
        out[_TIME] = numbers["step_ms_median"][BASELINE] * ratio[0]
        out[_RATE] = 1000 * numbers["batch_size"][arm] / out[_TIME]
    else:
        out[_TIME + _OF_CELLS] = numbers["step_ms_median"][arm]
        out[_RATE + _OF_CELLS] = numbers["images_per_second"][arm]
    out |= {tag: numbers[key][arm] / 2**20 for tag, key in _MEMORY.items()}
    out |= dict(zip((_RATIO, *_ends(_RATIO)), ratio, strict=False))
    return {tag: float(value) for tag, value in out.items()}


def _layout(comparisons: Comparisons) -> dict[str, Any]:
    """Bands for the custom scalars; an epoch alone makes no band, so that its points are shown."""
    single = comparisons.study.configuration["epochs"] == 1
    bands = [tag for tag, _ in CURVES.values()] + [_RATIO] * (comparisons.timing is not None)
    charts = {
        tag: ["Multiline", [f"^{re.escape(tag)}$"]] if single and tag != _RATIO else ["Margin", [tag, *_ends(tag)]]
        for tag in reversed(bands)  # TensorBoard shows the last first
    }
    return {"An arm's mean over seeds ± standard deviation; step time with its interval": charts}


def _ends(tag: str) -> tuple[str, str]:
    """The tags of a band's lower and upper end: a group of their own, below."""
    return f"~ends of bands/{tag}, low", f"~ends of bands/{tag}, high"


def _profile(writer: Any, pages: Pages, folder: Path) -> None:
    """Its texts and images, and the trace under the name that torch-tb-profiler looks for."""
    for tag, text in pages.texts.items():
        writer.add_text(f"profile/{tag}", text, 0)
    for name, path in pages.images.items():
        writer.add_image(f"profile/{name}", _pixels(path), 0, dataformats="HWC")
    trace = folder / "step.pt.trace.json.gz"
    trace.unlink(missing_ok=True)
    trace.symlink_to(os.path.relpath(pages.source / "trace.json.gz", folder))


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))
