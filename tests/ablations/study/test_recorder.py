"""What TensorBoard will find in the cells, read back with its own reader."""

import os
import re
import shutil
import threading
from contextlib import closing
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from ablations.study import recorder
from ablations.study.speaking import one_message
from ablations.study.store import cell_folder
from core.errors import InputError

CELLS = tuple(cell_folder(Path(), arm, 0).as_posix() for arm in ("baseline", "decatt+mrt", "crs@0.5+flash"))


@pytest.fixture(scope="module")
def study(trained):
    return EventMultiplexer().AddRunsFromDirectory(str(trained)).Reload()


@pytest.mark.parametrize(
    "tag",
    [
        "train/loss", "train/accuracy", "train/learning_rate", "val/loss", "val/accuracy", "speed/images_per_second",
        "speed/step_ms", "memory/peak_mib",
    ],
)  # fmt: skip
def test_scalars_by_epoch(study, tag):
    for name in CELLS:
        points = study.Scalars(name, tag)
        assert [p.step for p in points] == [1, 2]


def test_links_that_lead_nowhere_cost_no_cell(tmp_path):
    for name in ("result.json", "mine"):
        (tmp_path / name).symlink_to("nowhere")
    made = recorder.Recorder(tmp_path)
    made.correct(torch.ones(1, 1, dtype=torch.bool))
    made.finish(dict.fromkeys((*recorder.METRICS, "peak_bytes", "kept_bytes", "epochs"), 1), {})
    assert (tmp_path / "result.json").is_file()
    assert (tmp_path / "mine").is_symlink()


def test_a_folder_that_is_removed_meanwhile_is_told_in_lines(tmp_path, capsys, monkeypatch):
    """By TensorBoard's thread in one, and by whoever writes next."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    made = recorder.Recorder(tmp_path / "seed0")
    made._writer.flush()
    shutil.rmtree(tmp_path / "seed0")
    with pytest.raises(SystemExit, match="2"), one_message(), closing(made):
        made._writer.add_scalar("train/loss", 1.0, 1)
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"^Thread-\d+", "Thread", line).partition(":")[0] for line in lines] == ["Thread", "error"]
    assert all("No such file or directory" in line for line in lines)


def test_what_is_in_the_place_of_a_table_is_not_waited_for(tmp_path):
    made = recorder.Recorder(tmp_path)
    os.mkfifo(tmp_path / "correct.npz")
    with pytest.raises(InputError, match="correct.npz' is a device or a pipe"):
        made.correct(torch.ones(1, 2, dtype=torch.bool))
    made.close()


def test_hparams_of_every_arm(study):
    for name in CELLS:
        metadata = study.PluginRunToTagToContent("hparams")[name]
        start = plugin_data_pb2.HParamsPluginData.FromString(metadata["_hparams_/session_start_info"])
        shown = start.session_start_info.hparams
        assert shown["arm"].string_value == name.split("/")[-2]
        assert shown["decatt"].string_value == ("on" if "decatt" in name else "off")
        for metric in ("best_val_accuracy", "final_val_loss", "step_ms_median", "peak_mib", "kept_mib", "mfu"):
            assert study.Scalars(name, f"result/{metric}")


def test_layout_puts_the_arms_side_by_side(study):
    for name in CELLS:
        (event,) = study.Tensors(name, "custom_scalars__config__")
        layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
        tags = [tag for chart in layout.category[0].chart for tag in chart.multiline.tag]
        assert "^val/accuracy$" in tags
