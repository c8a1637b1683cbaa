"""A cell's files while it trains: metrics by epoch, TensorBoard events; its result comes last."""

import json
from fnmatch import fnmatch
from pathlib import Path

from torch import Tensor

from ablations.study.store import Result, Row, write_arrays, write_result
from core import files

LAYOUT = {
    "Arms side by side": {
        "Validation accuracy": ["Multiline", [r"^val/accuracy$"]],
        "Validation loss": ["Multiline", [r"^val/loss$"]],
        "Training loss": ["Multiline", [r"^train/loss$"]],
        "Images per second": ["Multiline", [r"^speed/images_per_second$"]],
        "Step time (ms)": ["Multiline", [r"^speed/step_ms$"]],
        "Peak memory of a step (MiB)": ["Multiline", [r"^memory/peak_mib$"]],
    }
}
WRITTEN = (  # in a cell's folder; the rest is the user's
    *("metrics.jsonl", "correct.npz", "result.json", "failed.json", "best.safetensors"),
    *("tokens.npz", "events.out.tfevents.*", ".*.partial"),
)
METRICS = (  # of a result, in HParams
    *("best_val_accuracy", "final_val_accuracy", "final_val_loss", "final_train_loss"),
    *("images_per_second", "step_ms_median", "train_seconds", "mfu", "parameters"),
)


class Recorder:
    """The files of one cell. Without a result.json, which is written last, the cell does not count. A cell that goes on
    from a snapshot writes its epochs anew, so that none is there twice or missing."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if folder.is_symlink() or not folder.is_dir():
            files.remove(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        for left in self._own():  # by a killed run
            files.remove(left)
        self._writer = SummaryWriter(str(folder))
        self._writer.add_custom_scalars(LAYOUT)
        self._metrics = (folder / "metrics.jsonl").open("w", encoding="utf-8")

    def epoch(self, row: Row, when: float | None = None) -> None:
        """Add one epoch's metrics to metrics.jsonl and TensorBoard (tags are the keys with a /). when: it was recorded
        (POSIX seconds); now unless given."""
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        for tag, value in row.items():
            if "/" in tag:
                self._writer.add_scalar(tag, value, int(row["epoch"]), walltime=when)

    def correct(self, table: Tensor) -> None:
        """Keep which validation images were classified correctly after each epoch: bool [epochs, images]."""
        write_arrays(self.folder / "correct.npz", correct=table)

    def finish(self, result: Result, settings: dict[str, str | int | float | bool]) -> None:
        """Close the cell: HParams in the cell's own event file, then the result."""
        from torch.utils.tensorboard.summary import hparams

        measured = {f"result/{k}": float(result[k]) for k in METRICS}
        measured |= {f"result/{k}_mib": result[f"{k}_bytes"] / 2**20 for k in ("peak", "kept")}
        for summary in hparams(settings, measured):
            self._writer._get_file_writer().add_summary(summary)
        for tag, value in measured.items():
            self._writer.add_scalar(tag, value, result["epochs"])
        self.close()
        for path in self._own():
            files.sync(path)
        write_result(self.folder, result)

    def _own(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if any(fnmatch(path.name, name) for name in WRITTEN)]

    def close(self) -> None:
        """Close the files."""
        self._writer.close()
        self._metrics.close()
