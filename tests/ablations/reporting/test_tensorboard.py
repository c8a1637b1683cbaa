"""What TensorBoard will find in a report, read back with its own reader."""

import statistics
from dataclasses import asdict

import pytest
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from ablations.reporting import compose
from ablations.reporting.tensorboard import RUNS
from ablations.study.profiling import Operation, Profile
from ablations.study.reading import read
from ablations.study.store import cell_folder, write_json

ARMS = ("baseline", "flash", "mrt", "flash+mrt")
ACCURACY = "accuracy/validation, %"


def found(folder):
    compose.write([folder])
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder / "report" / "tensorboard"))
    return multiplexer.Reload()


@pytest.fixture(scope="module")
def folder(synthetic, tmp_path_factory):
    return synthetic(tmp_path_factory.mktemp("tensorboard") / "study")


@pytest.fixture(scope="module")
def board(folder):
    return found(folder)


def values(board, arm, tag):
    return [event.value for event in board.Scalars(arm, tag)]


def charts(board):
    (event,) = board.Tensors("report", "custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return {chart.title: chart for category in layout.category for chart in category.chart}


def text(board, title):
    (tag,) = (t for t in board.Runs()["report"]["tensors"] if t.endswith(f" {title}/text_summary"))
    (event,) = board.Tensors("report", tag)
    return event.tensor_proto.string_val[0].decode()


def test_a_run_an_arm_and_the_report(board):
    assert set(board.Runs()) == {"report", *ARMS}


def test_the_figures_are_images_and_the_tables_texts_verdicts_first(board):
    assert {"learning_curves", "kept_bytes", "pareto", "effects", "tokens_mrt"} == set(board.Runs()["report"]["images"])
    assert "| `mrt` |" in text(board, "Verdicts")
    titles = sorted(tag for tag in board.Runs()["report"]["tensors"] if tag.endswith("/text_summary"))
    assert titles[0] == "01 Verdicts/text_summary"


def test_the_seeds_of_an_arm_are_one_band(board, folder):
    """Mean and standard deviation by hand; an exact arm has its twin's accuracy."""
    cells = read([folder]).arms
    for chart in charts(board).values():
        assert len(chart.margin.series) == 1
    (band,) = charts(board)[ACCURACY].margin.series
    for arm, of in (("mrt", "mrt"), ("flash+mrt", "mrt"), ("flash", "baseline")):
        rows = [[100 * row["val/accuracy"] for row in cell.rows] for cell in cells[of]]
        for i, seeds in enumerate(zip(*rows, strict=True)):
            mean, deviation = statistics.mean(seeds), statistics.stdev(seeds)
            assert values(board, arm, band.value)[i] == pytest.approx(mean)
            assert values(board, arm, band.lower)[i] == pytest.approx(mean - deviation)
            assert values(board, arm, band.upper)[i] == pytest.approx(mean + deviation)


def test_costs(board):
    """Step time: the baseline's cells' (30 ms) times the ratio of the timing pass, not the arms' own cells'."""
    for arm, ratio in (("baseline", 1.0), ("flash", 0.9), ("mrt", 1.1)):
        assert values(board, arm, "cost/1 step time, ms") == pytest.approx([30 * ratio] * 2)
        assert values(board, arm, "cost/2 images a second") == pytest.approx([32000 / 30 / ratio] * 2)
        assert values(board, arm, "cost/3 peak memory, MiB") == [32, 32]
        assert values(board, arm, "cost/4 peak memory predicted, MiB") == [16, 16]
        assert values(board, arm, "cost/6 step time over the baseline's") == pytest.approx([ratio] * 2)
    assert values(board, "flash", "cost/5 kept for the backward pass, MiB") == [4, 4]
    assert charts(board)["cost/6 step time over the baseline's"].margin.series


def test_hparams_put_accuracy_time_speed_and_memory_first(board):
    for arm in ARMS:
        content = board.PluginRunToTagToContent("hparams")[arm]
        said = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
        tags = [metric.name.tag for metric in said.metric_infos]
        assert tags[:3] == [ACCURACY, "cost/1 step time, ms", "cost/2 images a second"]
        assert tags[3] == "cost/3 peak memory, MiB"
        assert all(board.Scalars(arm, tag) for tag in tags)
        row = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/session_start_info"])
        count = 0 if arm == "baseline" else len(arm.split("+"))
        assert row.session_start_info.hparams["optimizations"].number_value == count


def test_without_a_timing_pass_the_cells_times_are_named_so(synthetic, tmp_path):
    board = found(synthetic(tmp_path / "study", timed=False))
    for arm, ms in (("baseline", 30), ("flash", 27)):
        tags = board.Runs()[arm]["scalars"]
        assert values(board, arm, "cost/1 step time, ms (of the cells, not interleaved)") == [ms, ms]
        assert not {"cost/1 step time, ms", "cost/2 images a second", "cost/6 step time over the baseline's"} & {*tags}


def test_a_single_epoch_has_points_instead_of_bands(synthetic, tmp_path):
    board = found(synthetic(tmp_path / "study", epochs=1, seeds=2))
    assert charts(board)[ACCURACY].multiline.tag == [r"^accuracy/validation,\ %$"]
    assert [event.step for event in board.Scalars("mrt", ACCURACY)] == [1]


def test_of_many_arms_the_most_important_ones_are_runs(synthetic, tmp_path):
    pairs = [f"crs@{i / 100:g}+mrt" for i in range(10, 50)]
    board = found(synthetic(tmp_path / "study", arms=("baseline", *pairs, "mrt", "flash"), seeds=1, epochs=1))
    runs = set(board.Runs())
    assert len(runs) == RUNS
    assert {"report", "baseline", "mrt", "flash"} <= runs
    said = text(board, "Arms that are not runs")
    assert all((f"`{pair}`" in said) != (pair in runs) for pair in pairs)


def test_profiles_lie_in_the_run_of_their_arm(synthetic, tmp_path):
    folder = synthetic(tmp_path / "study", arms=("baseline", "flash"), seeds=1, epochs=1)
    for arm in ("baseline", "flash"):
        made = Profile(
            arm, "cpu", 3, 7.0, 8.0, (Operation("mm", "matrix product", 1.0, 1.0, 0.0),), [0.0, 1.0], [2**20, 2**21]
        )
        place = cell_folder(folder, arm, 0).parent / "profile"
        place.mkdir()
        (place / "trace.json.gz").write_text(arm)
        write_json(place / "profile.json", asdict(made) | {"operations": [o._asdict() for o in made.operations]})
    board = found(folder)
    for arm in ("baseline", "flash"):
        assert {"profile/categories", "profile/memory"} == set(board.Runs()[arm]["images"])
        assert {"profile/operations/text_summary", "profile/difference/text_summary"} <= {*board.Runs()[arm]["tensors"]}
        assert (folder / "report" / "tensorboard" / arm / "step.pt.trace.json.gz").read_text() == arm
