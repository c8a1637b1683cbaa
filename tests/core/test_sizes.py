import os

import pytest

from core import sizes
from core.errors import InputError
from core.sizes import memory, of_groups, read_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * 2**30), ("900MB", 900 * 10**6), ("1.5g", 1.5e9), (" 2 KiB ", 2048), ("3t", 3e12)],
)
def test_read_bytes(text, size):
    assert read_bytes(text) == size


@pytest.mark.parametrize("text", ["", "512", "512B", "GiB", "-3GB", "0", "0.5", "24 apples", "1e9", "9" * 400])
def test_read_bytes_refuses(text):
    with pytest.raises(InputError, match=f"budget '{text}' is no size"):
        read_bytes(text)


@pytest.mark.parametrize(
    ("groups", "limits", "found"),
    [
        ("0::/job/step\n", {"job/step/memory.max": "max\n", "job/memory.max": "3000\n", "memory.max": "9000\n"}, 3000),
        ("0::/../other\n", {"memory.max": "5000\n"}, 5000),
        ("9:name=a:/\n4:memory:/box\n0::/\n", {"memory/box/memory.limit_in_bytes": "700\n"}, 700),
        ("2:cpu:/box\n", {"cpu/box/memory.limit_in_bytes": "700\n"}, None),
    ],
)
def test_limits_of_control_groups(tmp_path, groups, limits, found):
    """As containers (whose own group is the root that they see) and Slurm's jobs have them."""
    (tmp_path / "cgroup").write_text(groups)
    for name, text in limits.items():
        (tmp_path / "sys" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys" / name).write_text(text)
    assert min(of_groups(tmp_path / "cgroup", tmp_path / "sys"), default=None) == found
    assert not [*of_groups(tmp_path / "none", tmp_path / "sys")]


def test_the_least_limit_counts(monkeypatch):
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limits, found in (([], whole), ([2**62, 5000], 5000)):
        monkeypatch.setattr(sizes, "of_groups", lambda limits=limits: limits)
        assert memory("cpu") == found
