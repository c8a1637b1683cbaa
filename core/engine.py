"""How a step runs: eager, compiled, or as a replayed CUDA graph. The one impure room: it compiles, captures, owns
buffers and synchronises. Every engine has the same face: a loop that takes a state through an epoch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from core.data.batches import batches, gather, resident
from core.data.splits import Split
from core.errors import InputError, choose
from core.ops import Params
from core.step import AdamW, Batch, Metrics, Objective, State, Step, make_step

ENGINES = ("auto", "eager", "compiled", "graphed")
REPAYS = 2e14  # FLOPs of a cell from which compiling pays on a CPU: docs/results/cpu.md, "Engines"


def resolve(name: str, device: str, work: float = 0.0) -> tuple[str, str]:
    """The engine that `name` means on this device ("cpu" or "cuda"), and why.

    work: FLOPs of training one cell. Raises InputError for an engine that is unknown or not to be had.
    """
    choose("engine", name, ENGINES)
    if name == "graphed" and device != "cuda":
        raise InputError("engine 'graphed' is a CUDA graph and needs --device cuda; pass --engine compiled or eager")
    if name != "auto":
        return name, "as asked"
    if device == "cuda":
        return "graphed", "no host work between steps"
    if work >= REPAYS:
        return "compiled", f"{work:.0e} FLOPs a cell repay compiling"
    return "eager", f"{work:.0e} FLOPs a cell would not repay compiling"


def build(loss: Objective, optimizer: AdamW, engine: str, differentiator: str = "autograd") -> Step:
    """The training step of a loss under an engine."""
    return make_step(loss, optimizer, differentiator, _compile if engine != "eager" else lambda fn: fn)


def _compile(fn: Callable[..., Any]) -> Callable[..., Any]:
    """One graph, static shapes; a graph break is an error."""
    return torch.compile(fresh(fn), fullgraph=True, dynamic=False)


def fresh(fn: Any) -> Callable[..., Any]:
    """The same function with a code object of its own. torch.compile keeps its results by code object: the arms' losses
    would share one list, be checked against each other's guards at every call, and reach its limit."""
    return FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)


class Stepwise:
    """The loop of the engines eager and compiled: the host issues every step.

    norms: remembered gradient norms by name [images,N] (see step.memory), updated in place; {} for none.
    """

    def __init__(self, step: Step, split: Split, size: int, device: torch.device, norms: Params) -> None:
        self._step, self._split, self._size, self._device, self._norms = step, split, size, device, norms

    def warm_up(self, state: State) -> None:
        """Compile, if need be: one step, whose result is thrown away."""
        order = torch.arange(self._size, device=self._split.images.device)
        for batch in batches(self._split, order, self._size, self._device):
            self._step(state, _with_norms(batch, self._norms, order.to(self._device)))

    def epoch(self, state: State, order: Tensor, done: Callable[[], None] = lambda: None) -> tuple[State, Metrics]:
        """A step for every whole batch of this order [n]; `done` is called when each was issued. The metrics are
        [steps]."""
        metrics = []
        source = batches(self._split, order, self._size, self._device)
        for index, batch in zip(order.split(self._size), source, strict=False):
            state, measured = self._step(state, _with_norms(batch, self._norms, index))
            for name, rows in (measured.norms or {}).items():
                self._norms[name].index_copy_(0, index.to(rows.device), rows)
            metrics.append(measured._replace(norms=None))
            done()
        return state, _columns([torch.stack(column) for column in zip(*(m[:-1] for m in metrics), strict=True)])


def _with_norms(batch: tuple[Tensor, ...], norms: Params, index: Tensor) -> Batch:
    """The batch, with its images' rows of the remembered gradient norms if there are any."""
    images, labels = batch
    if not norms:
        return images, labels
    return images, labels, {n: rows.index_select(0, index.to(rows.device)) for n, rows in norms.items()}


class Graphed:
    """The loop of the engine graphed: a step captured once as a CUDA graph over static buffers, and replayed.

    State, order, position and metrics lie in buffers on the device. A replay reads the position, gathers its batch
    (or takes the one streamed into a buffer), writes the new state over the old one and advances the position, so
    that an epoch of resident data is replays with no host work between them.

    per_replay: steps in one graph, which must divide the steps of an epoch; resident data only.
    capture: body -> function that runs it again.
    """

    def __init__(
        self,
        step: Step,
        split: Split,
        size: int,
        device: torch.device,
        norms: Params,
        per_replay: int = 1,
        capture: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
    ) -> None:
        steps = len(split.labels) // size
        self._resident = resident(split, device) or device.type == "cpu"
        if steps % per_replay or (per_replay > 1 and not self._resident):
            raise InputError(f"{per_replay} steps a replay must divide the {steps} of an epoch, on resident data")
        self._step, self._split, self._size, self._device, self._norms = step, split, size, device, norms
        self._per_replay, self._capture = per_replay, capture or _cuda_graph
        self._order = torch.zeros(steps, size, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._metrics = torch.zeros(steps, len(Metrics._fields) - 1, dtype=torch.float64, device=device)
        self._streamed = () if self._resident else tuple(torch.zeros_like(t[:size], device=device) for t in split)
        self._state: State | None = None
        self._replay: Callable[[], None] | None = None

    def warm_up(self, state: State) -> None:
        """Compile and capture."""
        self._start(state)
        if self._replay is None:
            with _on_side_stream(self._device):
                for _ in range(3):
                    self._position.zero_()
                    self._steps()
            self._position.zero_()
            self._replay = self._capture(self._steps)

    def epoch(self, state: State, order: Tensor, done: Callable[[], None] = lambda: None) -> tuple[State, Metrics]:
        """A step for every whole batch of this order [n]; `done` is called when each replay was issued. The metrics
        are [steps]."""
        if self._replay is None:
            self.warm_up(state)
        self._start(state)
        self._order.copy_(order[: self._order.numel()].view_as(self._order))
        if self._resident:
            for _ in range(len(self._order) // self._per_replay):
                self._run(done)
        else:
            for batch in batches(self._split, order, self._size, self._device):
                for static, streamed in zip(self._streamed, batch, strict=True):
                    static.copy_(streamed)
                self._run(done)
        return tree_map(torch.clone, self._state), _columns(list(self._metrics.clone().unbind(1)))

    def _start(self, state: State) -> None:
        if self._state is None:
            self._state = tree_map(torch.clone, state)
        else:
            _overwrite(self._state, state)
        self._position.zero_()

    def _run(self, done: Callable[[], None]) -> None:
        assert self._replay is not None
        self._replay()
        done()

    def _steps(self) -> None:
        """What is captured."""
        assert self._state is not None
        for _ in range(self._per_replay):
            index = self._order.index_select(0, self._position)[0]
            batch = gather(self._split, index) if self._resident else self._streamed
            state, measured = self._step(self._state, _with_norms(batch, self._norms, index))
            for name, rows in (measured.norms or {}).items():
                self._norms[name].index_copy_(0, index, rows)
            row = torch.stack([value.double() for value in measured[:-1]])
            self._metrics.index_copy_(0, self._position, row[None])
            _overwrite(self._state, state)
            self._position += 1


def _columns(values: list[Tensor]) -> Metrics:
    loss, cross_entropy, penalty, correct, learning_rate = values
    return Metrics(loss, cross_entropy, penalty, correct, learning_rate)


Loop = Stepwise | Graphed


def loop(engine: str, step: Step, split: Split, size: int, device: torch.device, norms: Params) -> Loop:
    """The loop of an engine over a training split, batches of `size` images."""
    return (Graphed if engine == "graphed" else Stepwise)(step, split, size, device, norms)


def _overwrite(old: State, new: State) -> None:
    for mine, other in ((old[:3], new[:3]), (old[3:], new[3:])):  # floats, integers: one launch for each kind
        torch._foreach_copy_(tree_leaves(mine), tree_leaves(other))


@contextmanager
def _on_side_stream(device: torch.device) -> Iterator[None]:
    """Work on a stream of its own, as must be before a capture; does nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream(device).wait_stream(side)


@cache
def _pool() -> Any:
    """A graph whose memory pool all others share: nothing of theirs outlives a replay. It is kept for ever, since a
    pool cannot be used again once its last graph is gone."""
    keeper = torch.cuda.CUDAGraph()
    with torch.cuda.graph(keeper):
        torch.zeros(1, device="cuda")
    return keeper


def _cuda_graph(body: Callable[[], None]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_pool().pool()):
        body()
    return graph.replay
