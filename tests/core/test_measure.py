import time

import pytest
import torch

from core.measure import Ticks, peak_bytes, tensor_bytes

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


@pytest.mark.gpu
def test_peak_on_cuda():
    x = torch.zeros(1_000_000, device="cuda")
    peak = peak_bytes(lambda x: (x + 1) * 2, x, device=torch.device("cuda"))
    assert peak == pytest.approx(12_000_000, rel=0.05)
