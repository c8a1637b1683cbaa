import json
import os

from rich.console import Console

from ablations.study import speaking
from ablations.study.progress import Terminal
from ablations.study.store import cell_folder


def test_cells_are_counted_in_the_order_of_their_ends_by_whoever_shows_them(tmp_path, capsys):
    cells = [cell_folder(tmp_path, "baseline", seed) for seed in range(3)]
    outcomes = [{"arm": "baseline", "seed": seed, "error": "none", "traceback": ""} for seed in range(3)]
    for seed, second in ((2, 5), (0, 7)):
        cells[seed].mkdir(parents=True)
        (cells[seed] / "failed.json").write_text(json.dumps(outcomes[seed]))
        os.utime(cells[seed] / "failed.json", (second, second))
    Terminal(Console(), cells, bar=False).done(outcomes[0])
    Terminal(Console(), cells, bar=False).done(outcomes[2])
    Terminal(Console()).done(outcomes[2])  # on the machine of one cell
    assert capsys.readouterr().out.splitlines() == [
        "[2/3] baseline seed 0: failed: none", "[1/3] baseline seed 2: failed: none", "baseline seed 2: failed: none"
    ]  # fmt: skip


def test_a_terminal_that_is_closed_ends_nothing():
    there, here = os.pipe()
    os.close(there)
    with os.fdopen(here, "w") as closed:
        console = speaking.Console(file=closed)
        for _ in range(2):
            console.print("nobody reads this")
        assert console.quiet
