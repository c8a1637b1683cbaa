"""A study in TensorBoard: every arm's seeds as one curve with a band, the report's tables as text, its figures."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ablations.analysis.comparisons import Views
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


def write(folder: Path, views: Views, texts: Mapping[str, Sequence[str]], drawn: Mapping[str, Path]) -> None:
    """The run `folder` with texts (Markdown by title) and figures, and below it a run an arm with its margin charts."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        writer.add_custom_scalars(LAYOUT)
        for i, (title, lines) in enumerate(texts.items(), 1):
            if lines:
                writer.add_text(f"{i:02} {title}", "\n".join(lines), 0)  # TensorBoard sorts them
        for name, path in drawn.items():
            writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), 0, dataformats="HWC")
    for arm, cells in views.study.arms.items():
        with SummaryWriter(str(folder / arm)) as writer:
            for tag in CURVES:
                for epoch, mean, deviation in _band(cells, tag):
                    for part, value in (("", mean), ("/lower", mean - deviation), ("/upper", mean + deviation)):
                        writer.add_scalar(f"seeds/{tag}{part}", value, epoch)


def _band(cells: Sequence[Cell], tag: str) -> list[tuple[int, float, float]]:
    """Epoch, mean and standard deviation over seeds (0 for one)."""
    values = np.array([[row[tag] for row in cell.rows] for cell in cells])
    deviation = values.std(0, ddof=1) if len(cells) > 1 else np.zeros(values.shape[1])
    return [(i + 1, float(m), float(s)) for i, (m, s) in enumerate(zip(values.mean(0), deviation, strict=True))]
