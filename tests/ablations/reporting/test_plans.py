import pytest
from rich.console import Console

from ablations.reporting import plans
from ablations.study.hours import Planned


@pytest.mark.parametrize(("flops", "told"), [(105_150_000_000, "105.15"), (2_828_900, "0.00283")])
def test_little_work_is_told_too(capsys, flops, told):
    sizes = ("kept", "peak", "state", "needed", "kept_bytes_per_block", *plans._PARTS)
    entry = dict.fromkeys((name if "bytes" in name else f"{name}_bytes" for name in sizes), 2**20)
    about = {"arm": "flash", "parameters": 1000, "flops_per_image": flops, "kept_by_op": {"mm": 2**20}}
    plans.show(Console(width=120), [entry | about], "a step", None)
    assert told in capsys.readouterr().out.split()


def test_the_table_says_it_all(capsys):
    left = [Planned("baseline", 0, 2.0), Planned("baseline", 1, 2.0)]
    plans.show_hours(Console(width=200), left, {"baseline": 0.5, "flash": 0.25}, "a test", 2)
    shown = " ".join(capsys.readouterr().out.split())
    assert "baseline 500.0 2 2.00 8.00" in shown
    assert "flash 250.0 0 — 0.00" in shown
    assert "2 cells, 8.00 device-hours. Devices, and when all cells are done: 2 in 4.00 h, 4 in 2.00 h." in shown
