"""What TensorBoard will find in a study, read back with its own reader."""

import statistics

import pytest
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from ablations import run


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


CELLS = ("baseline/seed0", "baseline/seed1", "decatt/seed0", "decatt/seed1")


def test_one_run_a_cell_one_for_the_report_one_an_arm_and_no_stray_ones(study):
    assert set(study.Runs()) == {*CELLS, "report", "report/baseline", "report/decatt"}


def test_the_figures_are_images_of_the_report(study):
    figures = {"accuracy_by_epoch", "accuracy_by_second", "kept_bytes", "pareto", "effects"}
    assert figures <= set(study.Runs()["report"]["images"])


def test_the_tables_are_texts_of_the_report(study):
    (tag,) = (
        tag for tag in study.Runs()["report"]["tensors"] if tag.endswith("Arms against the baseline/text_summary")
    )
    (event,) = study.Tensors("report", tag)
    assert "| `decatt` |" in event.tensor_proto.string_val[0].decode()


def test_the_seeds_of_an_arm_are_one_band(study):
    (event,) = study.Tensors("report", "custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    for chart in layout.category[0].chart:
        (band,) = chart.margin.series
        for arm in ("baseline", "decatt"):
            mean, lower, upper = (
                [p.value for p in study.Scalars(f"report/{arm}", tag)] for tag in (band.value, band.lower, band.upper)
            )
            assert mean == pytest.approx([(a + b) / 2 for a, b in zip(lower, upper, strict=True)])
    by_seed = [[p.value for p in study.Scalars(f"decatt/seed{s}", "val/accuracy")] for s in (0, 1)]
    mean, upper = (study.Scalars("report/decatt", f"seeds/val/accuracy{part}") for part in ("", "/upper"))
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
        assert shown["arm"].string_value == name.split("/")[0]
        assert shown["decatt"].string_value == ("on" if name.startswith("decatt") else "off")
        for metric in ("best_val_accuracy", "final_val_loss", "step_ms_median", "peak_mib", "kept_mib", "mfu"):
            assert study.Scalars(name, f"result/{metric}")


def test_layout_puts_the_arms_side_by_side(study):
    for name in CELLS:
        (event,) = study.Tensors(name, "custom_scalars__config__")
        layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
        tags = [tag for chart in layout.category[0].chart for tag in chart.multiline.tag]
        assert "^val/accuracy$" in tags
