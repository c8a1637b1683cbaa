import string
import subprocess
import time
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from core.measure import Ticks, busy_share, ceiling, gpu_state, in_rounds, interleaved, peak_bytes, ratios, tensor_bytes

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


def test_every_contender_is_warmed_up_and_has_a_block_a_round():
    calls = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    seconds = interleaved(runs, rounds=3, device=CPU)
    assert calls[:2] == ["a", "b"]
    assert len(calls) == 8
    assert [len(s) for s in seconds.values()] == [3, 3]


def test_blocks_in_a_new_order_each_round():
    calls = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    rounds = ["".join(name for name, _ in took) for took in islice(in_rounds(list(runs.items()), CPU), 300)]
    assert "".join(calls) == "".join(rounds)
    assert {"".join(sorted(r)) for r in rounds} == {"abc"}
    assert all(30 < rounds.count(order) < 70 for order in set(rounds))
    assert len(set(rounds)) == 6
    twice = [("a", runs["a"]), *runs.items()]
    rounds = ["".join(name for name, _ in took) for took in islice(in_rounds(twice, CPU), 300)]
    assert {"".join(sorted(r)) for r in rounds} == {"aabc"}
    assert len(set(rounds)) == 12


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


def rounds_of(seconds):
    """Rounds from the seconds [rounds] of each contender, None where it is in none."""
    rounds = zip(*seconds.values(), strict=True)
    return [[(name, s) for name, s in zip(seconds, took, strict=True) if s is not None] for took in rounds]


def test_ratios_of_few_rounds_are_a_paired_t_interval():
    draw = np.random.default_rng(0)
    seconds = {"a": draw.uniform(1, 2, 6).tolist(), "b": draw.uniform(1, 2, 6).tolist()}
    found = ratios(rounds_of(seconds), "a")
    logs = np.log(seconds["b"]) - np.log(seconds["a"])
    interval = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert found["b"] == pytest.approx(np.exp([logs.mean(), interval.low, interval.high]))
    assert found["a"] == (1, 1, 1)


@pytest.mark.parametrize("disturbed", [0.0, 0.1])
def test_intervals_of_ratios_cover_the_truth(disturbed):
    """95 % nominal; a load that doubles a tenth of the blocks neither biases them nor makes them useless."""
    draw, hits, widths = np.random.default_rng(1), 0, []
    for _ in range(1000):
        common = draw.normal(0, 0.05, 12)  # the machine's own drift: the same for all of a round
        load = [np.where(draw.random(12) < disturbed, np.log(2), 0) for _ in range(5)]
        seconds = {
            name: np.exp(common + draw.normal(0, 0.01, 12) + load[i] + (np.log(1.1) if name == "b" else 0)).tolist()
            for i, name in enumerate("abcde")
        }
        _, low, high = ratios(rounds_of(seconds), "a")["b"]
        hits += low <= 1.1 <= high
        widths.append(high - low)
    assert hits >= 935  # 95 % less two standard errors
    assert np.median(widths) < (0.022 if not disturbed else 0.06)


def test_rounds_that_some_are_not_in():
    seconds = {"a": [1.0, 2.0, 1.0, 4.0], "b": [2.0, 4.0, None, None], "c": [None, None, 3.0, 12.0]}
    found = ratios(rounds_of(seconds), "a")
    assert found["b"] == pytest.approx((2, 2, 2))
    assert found["c"] == pytest.approx((3, 3, 3))


def test_several_blocks_a_round_are_drawn_in_like_single_ones():
    """Three blocks of the reference and one of another, all of one skewed distribution, as a disturbed machine's is:
    they are told as the same."""
    draw, found = np.random.default_rng(4), []
    for _ in range(400):
        load = draw.exponential(0.3, (20, 30)) * (draw.random((20, 30)) < 0.1)
        blocks = load + draw.normal(0, 0.02, load.shape)
        names = [*"aaab", *string.ascii_letters[2:28]]
        found.append(ratios([list(zip(names, np.exp(took), strict=True)) for took in blocks], "a")["b"])
    ratio, low, high = np.log(found).T
    assert abs(ratio.mean()) < 3 * ratio.std() / 20
    assert ((low <= 0) & (high >= 0)).mean() > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 400)


def test_the_mean_of_the_blocks_of_a_round():
    rounds = [[("a", 1.0), ("b", 3.0), ("a", 4.0)], [("b", 6.0), ("a", 2.0), ("a", 8.0)]]
    assert ratios(rounds, "a")["b"] == pytest.approx((1.5, 1.5, 1.5))  # over the geometric mean


def test_groups_of_contenders_do_not_mix():
    """Twenty rounds beside slow contenders, four beside fast ones: the reference's place among them is no disturbance,
    and neither is that of the machine, which has slowed down."""
    truth = {"a": 1.0, "b": 3.0, "c": 4.0, "d": 0.5, "e": 0.25}
    times = [(f * (1 + i % 5 / 1000), f * 2) for i, f in enumerate(truth.values())]
    seconds = {
        name: [slow if name in "abc" else None] * 20 + [fast if name in "ade" else None] * 4
        for name, (slow, fast) in zip(truth, times, strict=True)
    }
    for name, found in ratios(rounds_of(seconds), "a").items():
        assert found == pytest.approx((truth[name],) * 3, rel=0.01)
