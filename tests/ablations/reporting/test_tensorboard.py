"""What TensorBoard will find in a study, read back with its own reader."""

import statistics
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from ablations import run
from ablations.study.store import cell_folder

ARMS = "report/tensorboard"
REPORT = f"{ARMS}/report"


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
            run.main()
    assert stop.value.code == 0
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(out))
    multiplexer.Reload()
    return multiplexer


CELLS = tuple(cell_folder(Path(), arm, seed).as_posix() for arm in ("baseline", "decatt") for seed in (0, 1))


def test_the_report_has_one_run_an_arm_and_no_stray_ones(study):
    assert set(study.Runs()) == {
        *CELLS,
        "report/tensorboard/report",
        *(f"{ARMS}/{arm}" for arm in ("baseline", "decatt")),
    }


def test_the_figures_are_images_of_the_report(study):
    figures = {"learning_curves", "kept_bytes", "pareto", "effects"}
    assert figures <= set(study.Runs()[REPORT]["images"])


def test_the_tables_are_texts_of_the_report(study):
    (tag,) = (tag for tag in study.Runs()[REPORT]["tensors"] if tag.endswith("Arms against the baseline/text_summary"))
    (event,) = study.Tensors(REPORT, tag)
    assert "| `decatt` |" in event.tensor_proto.string_val[0].decode()


def test_the_seeds_of_an_arm_are_one_band(study):
    (event,) = study.Tensors(REPORT, "custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    for chart in layout.category[0].chart:
        (band,) = chart.margin.series
        for arm in ("baseline", "decatt"):
            mean, lower, upper = (
                [p.value for p in study.Scalars(f"{ARMS}/{arm}", tag)] for tag in (band.value, band.lower, band.upper)
            )
            assert mean == pytest.approx([(a + b) / 2 for a, b in zip(lower, upper, strict=True)])
    by_seed = [
        [p.value for p in study.Scalars(cell_folder(Path(), "decatt", s).as_posix(), "val/accuracy")] for s in (0, 1)
    ]
    mean, upper = (study.Scalars(f"{ARMS}/decatt", f"seeds/val/accuracy{part}") for part in ("", "/upper"))
    for i, values in enumerate(zip(*by_seed, strict=True)):
        assert mean[i].value == pytest.approx(statistics.mean(values))
        assert upper[i].value == pytest.approx(statistics.mean(values) + statistics.stdev(values))


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
