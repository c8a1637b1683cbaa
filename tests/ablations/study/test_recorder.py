"""What TensorBoard will find in the cells, read back with its own reader."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from ablations.commands.main import main
from ablations.study.store import cell_folder


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("tensorboard") / "study"
    options = (
        "--preset quick --device cpu --image 8 --width 16 --depth 1 --heads 2 --mlp 32 --epochs 2 --batch-size 128"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sys.argv", ["run.py", "--out", str(out), "--arms", "baseline,decatt", "--seeds", "2", *options.split()]
        )
        with pytest.raises(SystemExit) as stop:
            main()
    assert stop.value.code == 0
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(out))
    multiplexer.Reload()
    return multiplexer


CELLS = tuple(cell_folder(Path(), arm, seed).as_posix() for arm in ("baseline", "decatt") for seed in (0, 1))


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
