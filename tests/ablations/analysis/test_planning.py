from math import sqrt

import synthetic
from scipy import stats

from ablations.analysis.planning import by_deviation
from ablations.reporting import words


def test_seeds_by_deviation_are_the_fewest_whose_interval_is_narrow_enough():
    margin, of = 0.5, 4
    for deviation, seeds in by_deviation(margin, of).items():
        half = {
            n: stats.t.ppf((1 + 0.95 ** (1 / of)) / 2, n - 1) * deviation / sqrt(n) for n in (seeds - 1, seeds) if n > 1
        }
        assert half[seeds] <= margin
        assert seeds == 2 or half[seeds - 1] > margin


def test_where_every_cell_is_damaged_it_says_so_and_plans_without(tmp_path):
    folder = synthetic.study(tmp_path / "study", ["baseline", "mrt"], seeds=2, epochs=2)
    assert "from those trained: mrt" in words.seeds(folder, 0.5, 1)
    for path in folder.glob("cells/*/*/result.json"):
        path.write_text("{")
    told = words.seeds(folder, 0.5, 1)
    assert "no finished cell yet" in told
    assert "result.json' cannot be read" in told
    assert told.splitlines() == [told]


def test_without_results_it_says_for_which_deviations(tmp_path):
    assert "none is trained yet" in words.seeds(tmp_path, 0.5, 4)
