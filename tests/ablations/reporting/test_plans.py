import pytest
from rich.console import Console

from ablations.reporting import plans


@pytest.mark.parametrize(("flops", "told"), [(105_150_000_000, "105.15"), (2_828_900, "0.00283")])
def test_little_work_is_told_too(capsys, flops, told):
    sizes = ("kept", "peak", "state", "needed", "kept_bytes_per_block", *plans._PARTS)
    entry = dict.fromkeys((name if "bytes" in name else f"{name}_bytes" for name in sizes), 2**20)
    about = {"arm": "flash", "parameters": 1000, "flops_per_image": flops, "kept_by_op": {"mm": 2**20}}
    plans.show(Console(width=120), [entry | about], "a step", None)
    assert told in capsys.readouterr().out.split()
