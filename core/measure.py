"""Time and memory of a step, taken the same way on CPU and CUDA."""

import gc
import math
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

AHEAD = 8  # steps that the host issues before it waits for a GPU: enough to hide it, few enough to stop soon


class Ticks:
    """Marks between steps. On CUDA an event in the stream, which the host is at most AHEAD of."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Note this moment."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True, blocking=True)
            event.record()
            self._marks.append(event)
            if len(self._marks) > AHEAD:
                self._marks[-AHEAD].synchronize()
        else:
            self._marks.append(time.perf_counter())

    def intervals(self) -> list[float]:
        """Seconds between neighbouring marks."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1000 for a, b in pairs]
        return [b - a for a, b in pairs]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def unsearched() -> Iterator[None]:
    """No collection of garbage searches what is there by now: a quarter of a second of whatever it falls in."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


Round = Sequence[tuple[str, float]]  # contenders and the seconds of their blocks, in the order in which they ran


def in_rounds(blocks: Sequence[tuple[str, Callable[[], object]]], device: torch.device) -> Iterator[Round]:
    """Without end: the seconds of all blocks of contenders, which may have several, a round in freshly shuffled order.
    Time and place are confounded otherwise. Whoever asks warms up first."""
    draw, left = random.Random(0), list(blocks)
    with unsearched():
        while True:
            draw.shuffle(left)
            took = []
            for name, run in left:
                synchronize(device)
                begin = time.perf_counter()
                run()
                synchronize(device)
                took.append((name, time.perf_counter() - begin))
            yield took


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every block of every contender: each warmed up by one block, then as many rounds (see `in_rounds`)."""
    for run in runs.values():
        run()
    found = [dict(took) for took in islice(in_rounds(list(runs.items()), device), rounds)]
    return {name: [took[name] for took in found] for name in runs}


Interval = tuple[float, float, float]  # a value and its ends


def ratios(rounds: Sequence[Round], reference: str) -> dict[str, Interval]:
    """How many times as long as the reference each contender takes, with its 95 % interval, from rounds that it shares
    with it, of which there are at least 2.

    The mean of the differences of logarithms within rounds (see `drawn_in`).
    """
    from scipy import stats  # half a second, for which no refusal of bad input should wait

    out = {}
    for name, row in drawn_in(rounds, reference).items():
        middle, se, df = winsorized_mean(row[~np.isnan(row)])
        half = float(stats.t.ppf(0.975, df)) * se
        out[name] = math.exp(middle), math.exp(middle - half), math.exp(middle + half)
    return out


def drawn_in(rounds: Sequence[Round], reference: str) -> dict[str, np.ndarray]:
    """Of each contender the logarithms [rounds] of its seconds over the reference's of the same round (nan: not in this
    one). First, over the median block of the round, the `cut` highest and lowest of each are drawn in to the next
    (winsorized), since what disturbs a machine is seldom and large: among rounds of the same contenders alone, for the
    median of others is another scale. Of several blocks a round it is the mean, each drawn in among its like: if one
    were the mean before, it would be drawn in otherwise than a single one."""
    rows: dict[tuple[str, int], np.ndarray] = {}
    for i, took in enumerate(rounds):
        seen: Counter[str] = Counter()
        for name, seconds in took:
            rows.setdefault((name, seen[name]), np.full(len(rounds), np.nan))[i] = math.log(seconds)
            seen[name] += 1
    logs = np.array(list(rows.values()))
    logs -= np.nanmedian(logs, axis=0)
    missing = np.isnan(logs)
    for pattern in np.unique(missing, axis=1).T:
        columns = (pattern == missing.T).all(1)
        ends, k = np.sort(logs[:, columns]), cut(columns.sum())
        logs[:, columns] = logs[:, columns].clip(ends[:, [k]], ends[:, [-1 - k]])
    names = [name for name, _ in rows]
    means = {name: logs[[other == name for other in names]].mean(0) for name in dict.fromkeys(names)}
    return {name: mean - means[reference] for name, mean in means.items()}


def winsorized_mean(values: np.ndarray) -> tuple[float, float, int]:
    """The mean of values whose `cut` ends were drawn in, its standard error (nan of one value), and their degrees of
    freedom (Dixon and Tukey, Technometrics 10, 1968)."""
    n = len(values)
    df = n - 2 * cut(n) - 1
    se = float(values.std(ddof=1)) / math.sqrt(n) * (n - 1) / df if n > 1 else math.nan
    return float(values.mean()), se, df


def cut(rounds: int) -> int:
    """How many of a contender's rounds count as disturbed at each end: a fifth; none below 8, where too few would be
    left."""
    return rounds // 5 if rounds >= 8 else 0


def tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors in nested tuples, lists and dicts, each storage once."""
    storages: dict[int, int] = {}

    def visit(node: Any) -> None:
        if isinstance(node, Tensor):
            storages[node.untyped_storage().data_ptr()] = node.untyped_storage().nbytes()
        elif isinstance(node, dict):
            visit(list(node.values()))
        elif isinstance(node, list | tuple):
            for item in node:
                visit(item)

    visit(tree)
    return sum(storages.values())


def peak_bytes(fn: Callable[..., Any], *args: Any, device: torch.device) -> int:
    """Peak bytes of tensors while fn(*args) runs once: its arguments, plus the most it held at a time.

    CUDA: the caching allocator's count. CPU: every allocation the profiler sees; scratch memory inside a
    math library is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn(*args)
        torch.cuda.synchronize(device)
        return tensor_bytes(args) + torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        fn(*args)
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return tensor_bytes(args) + peak


def reserved_bytes(device: torch.device) -> int:
    """The most that the CUDA allocator held since `peak_bytes` last looked, for the whole process, other arms' graphs
    and free blocks included; 0 on CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0


def ceiling(dtype: torch.dtype, device: torch.device, side: int = 0) -> float:
    """FLOP/s of a product of square matrices, the median of seven runs: what MFU is a share of.

    side: of the matrices; 0 for 8192 on CUDA and 1536 on CPU, or 512 in bf16: many a CPU has no instructions for it,
        and needs seconds for a product of 1536.
    """
    side = side or (8192 if device.type == "cuda" else 1536 if dtype == torch.float32 else 512)
    a = torch.randn(side, side, device=device).to(dtype)  # constants would draw less power and run at higher clocks
    for _ in range(10 if device.type == "cuda" else 2):
        a @ a
    ticks = Ticks(device)
    ticks.mark()
    for _ in range(7):
        a @ a
        ticks.mark()
    return 2 * side**3 / median(ticks.intervals())


def idle_share(run: Callable[[], object], device: torch.device) -> float | None:
    """The share of a run in which a GPU computes nothing, between its first kernel and its last, at most: tracing
    itself adds gaps. None on CPU, and where kernels cannot be traced."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize(device)
    events = trace.profiler.kineto_results.events()
    spans = [(e.start_ns(), e.end_ns()) for e in events if e.device_type() == DeviceType.CUDA]
    return 1 - busy_share(spans) if spans else None


def busy_share(spans: Sequence[tuple[int, int]]) -> float:
    """The share of the time from the first begin to the last end that spans (begin, end), in any order, cover."""
    covered, until = 0, min(begin for begin, _ in spans)
    first = until
    for begin, end in sorted(spans):
        covered += max(0, end - max(begin, until))
        until = max(until, end)
    return covered / max(until - first, 1)


def gpu_state(device: torch.device) -> dict[str, str]:
    """Clocks (MHz), reasons for throttling, temperature (°C) and power (W) of a GPU as nvidia-smi tells them, or why
    they are not known; {} on CPU."""
    if device.type != "cuda":
        return {}
    identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = ["nvidia-smi", f"--id={identity}", f"--query-gpu={','.join(_GPU)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"unknown": str(error)}
    return dict(zip(_GPU, (value.strip() for value in answer.split(",")), strict=True))


_GPU = ["clocks.sm", "clocks.max.sm", "clocks.mem", "clocks_event_reasons.active", "temperature.gpu", "power.draw"]
