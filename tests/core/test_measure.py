import subprocess
import time
from random import Random
from types import SimpleNamespace

import pytest
import torch

from core.measure import Ticks, busy_share, ceiling, gpu_state, interleaved, peak_bytes, tensor_bytes

CPU = torch.device("cpu")


def test_tensor_bytes_counts_a_storage_once():
    a = torch.zeros(10)
    assert tensor_bytes((a, {"view": a[2:], "other": [torch.zeros(3, dtype=torch.int64)]})) == 40 + 24


def test_peak_is_the_most_alive_at_once():
    def fn(x):
        a = x + 1  # 4 MB
        b = a * 2  # 8 MB alive
        del a
        c = b - 1  # 8 MB alive
        return c

    x = torch.zeros(1_000_000)
    assert peak_bytes(fn, x, device=CPU) == pytest.approx(12_000_000, rel=0.001)


def test_ticks():
    ticks = Ticks(CPU)
    ticks.mark()
    time.sleep(0.02)
    ticks.mark()
    ticks.mark()
    first, second = ticks.intervals()
    assert first >= 0.02
    assert 0 <= second < first


def test_blocks_are_interleaved():
    calls = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    seconds = interleaved(runs, rounds=3, device=CPU)
    assert "".join(calls) == "ab" * 4
    assert [len(s) for s in seconds.values()] == [3, 3]


def test_blocks_in_a_new_order_each_round():
    calls = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    interleaved(runs, rounds=300, device=CPU, shuffle=Random(0))
    rounds = ["".join(calls[i : i + 3]) for i in range(3, len(calls), 3)]
    assert {"".join(sorted(r)) for r in rounds} == {"abc"}
    assert all(30 < rounds.count(order) < 70 for order in set(rounds))
    assert len(set(rounds)) == 6


def test_blocks_last_as_long_as_they_must():
    calls = []

    def run():
        calls.append(time.perf_counter())
        time.sleep(0.002)

    seconds = interleaved({"short": run}, rounds=2, device=CPU, at_least=0.02)["short"]
    assert 7 <= (len(calls) - 2) / 2 <= 10
    assert all(0.002 <= s < 0.01 for s in seconds)


@pytest.mark.gpu
def test_peak_on_cuda():
    x = torch.zeros(1_000_000, device="cuda")
    peak = peak_bytes(lambda x: (x + 1) * 2, x, device=torch.device("cuda"))
    assert peak == pytest.approx(12_000_000, rel=0.05)


def test_busy_share_counts_overlaps_once():
    assert busy_share([(0, 10)]) == 1
    assert busy_share([(40, 60), (0, 10), (5, 20), (6, 8)]) == pytest.approx(40 / 60)
    assert busy_share([(0, 1), (99, 100)]) == pytest.approx(0.02)


def test_ceiling_is_of_the_order_of_a_product():
    assert 1e8 < ceiling(torch.float32, CPU, side=256) < 1e14


def test_gpu_state_is_read_or_says_why_not(monkeypatch):
    assert gpu_state(CPU) == {}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1"))

    def answer(query, **options):
        assert query[1] == "--id=GPU-1"
        return SimpleNamespace(stdout="1980, 1980, 3201, 0x0000000000000004, 41, 300.5\n")

    monkeypatch.setattr(subprocess, "run", answer)
    found = gpu_state(torch.device("cuda"))
    assert (found["clocks.sm"], found["clocks_event_reasons.active"]) == ("1980", "0x0000000000000004")

    def missing(query, **options):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", missing)
    assert gpu_state(torch.device("cuda")) == {"unknown": "nvidia-smi"}
