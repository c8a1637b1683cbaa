"""A study in TensorBoard: a run an arm, its seeds as one curve with a band; the report's tables and figures beside."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ablations.analysis.comparisons import Comparisons
from ablations.reporting.profiles import Pages
from ablations.study.reading import Cell

CURVES = {
    "val/accuracy": "Validation accuracy",
    "val/loss": "Validation loss",
    "train/loss": "Training loss",
    "speed/images_per_second": "Images per second",
}
LAYOUT = {
    "Seeds of an arm: mean and standard deviation": {
        title: ["Margin", [f"seeds/{tag}{part}" for part in ("", "/lower", "/upper")]] for tag, title in CURVES.items()
    }
}


def write(
    folder: Path,
    comparisons: Comparisons,
    texts: Mapping[str, Sequence[str]],
    drawn: Mapping[str, Path],
    profiles: Mapping[str, Pages],
) -> None:
    """The run `report` with texts (Markdown by title) and figures, and a run an arm with its margin charts and what
    was profiled of it."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "report")) as writer:
        writer.add_custom_scalars(LAYOUT)
        for i, (title, lines) in enumerate(texts.items(), 1):
            if lines:
                writer.add_text(f"{i:02} {title}", "\n".join(lines), 0)  # TensorBoard sorts them
        for name, path in drawn.items():
            writer.add_image(name, _pixels(path), 0, dataformats="HWC")
    for arm, cells in comparisons.study.arms.items():
        with SummaryWriter(str(folder / arm)) as writer:
            for tag in CURVES:
                for epoch, mean, deviation in _band(cells, tag):
                    for part, value in (("", mean), ("/lower", mean - deviation), ("/upper", mean + deviation)):
                        writer.add_scalar(f"seeds/{tag}{part}", value, epoch)
            if arm in profiles:
                _profile(writer, profiles[arm], folder / arm)


def _profile(writer, pages: Pages, folder: Path) -> None:  # type: ignore[no-untyped-def]
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


def _band(cells: Sequence[Cell], tag: str) -> list[tuple[int, float, float]]:
    """Epoch, mean and standard deviation over seeds (0 for one)."""
    values = np.array([[row[tag] for row in cell.rows] for cell in cells])
    deviation = values.std(0, ddof=1) if len(cells) > 1 else np.zeros(values.shape[1])
    return [(i + 1, float(m), float(s)) for i, (m, s) in enumerate(zip(values.mean(0), deviation, strict=True))]
