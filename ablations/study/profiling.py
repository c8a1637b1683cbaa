"""What a training step spends time and memory on, by operation: a pass of its own over a few steps after training.

An arm's folder: profile.json (the numbers; written last), trace.json.gz (for ui.perfetto.dev; torch-tb-profiler finds
it by its link step.pt.trace.json.gz), on CUDA memory_snapshot.pickle (for pytorch.org/memory_viz), and what
ablations/reporting draws of it.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from statistics import mean, median
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.profiler
from torch.autograd import DeviceType

from ablations.study import schema
from ablations.study.store import read_study, write_json
from core.errors import InputError
from core.measure import Ticks, tensor_bytes
from core.step import Batch, State

# Parts of an operation's name, $ for its end; the first category with one of them counts.
CATEGORIES = {
    "optimizer": "_foreach_ triton_for_ _fused_adam multi_tensor_apply",
    "fused (compiled)": "compiled_graph triton_ cpp_fused Compiled",
    "attention kernel": "flash scaled_dot_product efficient_attention cudnn_attention sdpa fmha _Attention",
    "other": "autograd:: Backward TorchDynamo",
    "random, sort, index": "rand bernoulli normal_ uniform dropout sort topk gather scatter index embedding nonzero "
    "grid_sampler upsample bitwise shift__ xor__ and__",
    "matrix product": "mm matmul linear ::dot conv einsum nvjet",
    "normalization": "layer_norm batch_norm group_norm rms_norm",
    "reduction, loss": "reduce sum mean norm softmax loss cross_entropy amax amin argm ::max$ ::min$ ::any$ ::all$ "
    "prod ::var",
    "copy, layout": "copy Memcpy Memset ::cat CatArray clone contiguous stack view reshape permute transpose ::t$ "
    "::mT$ ::to$ slice select narrow expand as_strided squeeze split chunk unbind flip roll pad repeat flatten "
    "detach empty zero ones ::fill full resize diagonal resolve lift alias arange linspace",
    "elementwise": "elementwise add sub mul div sqrt pow exp log sin cos tanh sigmoid elu silu neg abs sign square "
    "lerp where fill clamp reciprocal floor ceil round maximum minimum deg2rad remainder ::eq ::ne ::lt ::le ::gt "
    "::ge",
}
_STEP = "vit-ablations: step"


class Operation(NamedTuple):
    """An operation's part of a step, what it calls not included: calls, ms (of its kernels on CUDA), MiB allocated less
    MiB freed. A `_foreach_` operation stands for all that it calls."""

    name: str
    category: str
    calls: float
    ms: float
    mib: float


@dataclass(frozen=True)
class Profile:
    """A step of an arm: ms without the profiler (median of `steps`) and with it (mean), operations by falling ms, and
    of the fastest step under the profiler the bytes `live[i]` from `at_ms[i]` on, the step's arguments included."""

    arm: str
    device: str
    steps: int
    wall_ms: float
    profiled_ms: float
    operations: Sequence[Operation]
    at_ms: Sequence[float]
    live: Sequence[int]

    @property
    def ms(self) -> float:
        """Of all operations."""
        return sum(o.ms for o in self.operations)

    def by(self, field: str) -> dict[str, tuple[float, float]]:
        """(ms, calls) a step by "name" or "category"."""
        sums: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        for o in self.operations:
            ms, calls = sums[getattr(o, field)]
            sums[getattr(o, field)] = ms + o.ms, calls + o.calls
        return dict(sums)


class Change(NamedTuple):
    """(ms, calls) a step of an operation or category in an arm and in the baseline, (0, 0) where it is not."""

    name: str
    arm: tuple[float, float]
    baseline: tuple[float, float]

    @property
    def ms(self) -> float:
        """Milliseconds more than in the baseline."""
        return self.arm[0] - self.baseline[0]

    @property
    def kind(self) -> str:
        """new, gone or changed."""
        return "new" if not self.baseline[1] else "changed" if self.arm[1] else "gone"


def category(name: str) -> str:
    """The category of an operation."""
    return next((c for c, parts in CATEGORIES.items() if any(part in f"{name}$" for part in parts.split())), "other")


def profile(
    step: Callable[[State, Batch], Any],
    state: State,
    batch: Batch,
    folder: Path,
    arm: str,
    steps: int = 3,
    made_by: Mapping[str, Any] = MappingProxyType({}),
) -> Profile:
    """Profile `steps` steps, after one to warm up and as many without the profiler; write what was seen into `folder`.

    The step is pure: all start from one state. made_by: of what study it is. InputError for fewer than one step.
    """
    if steps < 1:
        raise InputError(f"{steps} profiled steps are too few: at least 1")
    device = batch[0].device
    cuda = device.type == "cuda"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "profile.json").unlink(missing_ok=True)
    step(state, batch)
    ticks = Ticks(device)
    ticks.mark()
    for _ in range(steps):
        step(state, batch)
        ticks.mark()
    wall_ms = 1000 * median(ticks.intervals())
    trace = _trace(step, state, batch, steps, device)
    trace.export_chrome_trace(str(folder / "trace.json.gz"))
    (folder / "step.pt.trace.json.gz").unlink(missing_ok=True)
    (folder / "step.pt.trace.json.gz").symlink_to("trace.json.gz")
    if cuda:
        _snapshot(step, state, batch, folder / "memory_snapshot.pickle", device)
    raw = trace.profiler.kineto_results.events()
    spans = [(e.start_ns(), e.end_ns()) for e in raw if e.name() == _STEP and e.device_type() == DeviceType.CPU]
    profiled_ms = mean(end - begin for begin, end in spans) / 1e6
    at_ms, live = _timeline(raw, min(spans, key=lambda span: span[1] - span[0]), cuda, tensor_bytes((state, batch)))
    operations = _operations(trace.events(), cuda, steps)
    made = Profile(arm, str(device), steps, wall_ms, profiled_ms, operations, at_ms, live)
    write_json(folder / "profile.json", {**made_by, **asdict(made), "operations": [o._asdict() for o in operations]})
    return made


def _trace(step: Callable[..., Any], state: State, batch: Batch, steps: int, device: torch.device) -> Any:
    """Without input shapes: recording them may keep tensors alive, and the memory timeline would be another."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=kinds, profile_memory=True, acc_events=True) as trace:
        for _ in range(steps):
            with torch.profiler.record_function(_STEP):
                step(state, batch)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
    return trace


def _snapshot(step: Callable[..., Any], state: State, batch: Batch, path: Path, device: torch.device) -> None:
    torch.cuda.memory._record_memory_history(stacks="python", max_entries=1_000_000)
    try:
        step(state, batch)
        torch.cuda.synchronize(device)
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def _operations(events: Sequence[Any], cuda: bool, steps: int) -> list[Operation]:
    """From the profiler's events in order of start; on CUDA also the kernels that no operation launched, by name."""
    calls, us, size = Counter[str](), defaultdict[str, float](float), Counter[str]()
    graphs: dict[str, str] = {}
    for event in events:
        if event.device_type != DeviceType.CPU or event.name.startswith((_STEP, "[", "ProfilerStep")):
            continue
        owner = _owner(event)
        name = _readable(owner.name, graphs)
        calls[name] += owner is event
        us[name] += event.self_device_time_total if cuda else event.self_cpu_time_total
        size[name] += event.self_device_memory_usage if cuda else event.self_cpu_memory_usage
        for kernel in event.kernels:
            calls[_readable(kernel.name, graphs)] -= 1
            us[_readable(kernel.name, graphs)] -= kernel.duration
    for event in events:
        if event.device_type == DeviceType.CUDA and event.name != _STEP and not event.is_user_annotation:
            calls[_readable(event.name, graphs)] += 1
            us[_readable(event.name, graphs)] += event.time_range.elapsed_us()
    made = (Operation(n, category(n), calls[n] / steps, us[n] / steps / 1e3, size[n] / steps / 2**20) for n in us)
    return sorted((o for o in made if not cuda or abs(o.ms) > 1e-6 or o.mib), key=lambda o: -o.ms)


def _owner(event: Any) -> Any:
    """The outermost `_foreach_` operation around an event, or the event itself."""
    owner, node = event, event.cpu_parent
    while node is not None:
        owner, node = node if "_foreach_" in node.name else owner, node.cpu_parent
    return owner


def _readable(name: str, graphs: dict[str, str]) -> str:
    """A name that can be found in another arm: compiled graphs by order of first call, kernels without their number."""
    if name.startswith("## Call CompiledFxGraph"):
        return graphs.setdefault(name, f"compiled_graph {len(graphs) + 1}")
    return re.sub(r"(?<=^Torch-Compiled Region).*|(?<=^triton_)(.*)_\d+$", r"\1", name.replace("|", "/"))[:120]


def _timeline(raw: Sequence[Any], span: tuple[int, int], cuda: bool, held: int) -> tuple[list[float], list[int]]:
    """ms since a step's beginning and the live bytes from then on: `held`, then after every allocation and free."""
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    seen = [(e.start_ns(), e.nbytes()) for e in raw if e.name() == "[memory]" and e.device_type() == kind]
    inside = sorted((ns, size) for ns, size in seen if span[0] <= ns <= span[1])
    return [0.0, *((ns - span[0]) / 1e6 for ns, _ in inside)], list(accumulate((n for _, n in inside), initial=held))


def load(folder: Path) -> Profile:
    """The profile in a folder; Damaged if there is none, if it cannot be read, if it is of another arm than the folder
    is, or if it says that it was made under others than study.json has."""
    path = folder / "profile.json"
    saved = schema.read(path, schema.ProfileFile)
    if "settings" in saved:
        study = read_study(folder.parents[2])
        if (saved["settings"], saved.get("identity")) != (schema.settings(study), study.get("identity")):
            raise schema.Damaged(
                f"'{path}' was made under other settings, code, data or weights than study.json has; --profile, with "
                "the same options, makes it again"
            )
    if saved["arm"] != folder.parent.name:
        raise schema.Damaged(f"'{path}' is of another arm ({saved['arm']})")
    if odd := next((o["category"] for o in saved["operations"] if o["category"] not in CATEGORIES), None):
        raise schema.Damaged(f"'{path}' has operations of no category ({odd})")
    called = [Operation(**{name: o[name] for name in Operation.__annotations__}) for o in saved["operations"]]
    return Profile(**{name: saved[name] for name in Profile.__annotations__} | {"operations": called})


def finished(folder: Path) -> bool:
    """Whether the folder holds a profile that can be read."""
    try:
        load(folder)
    except schema.Damaged:
        return False
    return True


def difference(arm: Profile, baseline: Profile) -> dict[str, list[Change]]:
    """What an arm changes of the baseline's step, by "category" and by operation ("name"), most ms first."""
    none = (0.0, 0.0)
    sums = {field: (arm.by(field), baseline.by(field)) for field in ("category", "name")}
    return {
        field: sorted((Change(n, a.get(n, none), b.get(n, none)) for n in a | b), key=lambda c: -abs(c.ms))
        for field, (a, b) in sums.items()
    }
