"""How a step runs: eager, compiled, or as a replayed CUDA graph. The one impure room: it compiles, captures, owns
buffers and synchronises. Every engine has the same face: a loop that takes a state through an epoch."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from core.code import fresh
from core.data.batches import batches, gather, resident
from core.data.splits import Split
from core.errors import InputError, choose, said
from core.model import Config, of_blocks, shapes
from core.ops import Ops
from core.optimizers import Optimizer
from core.parallel import ALONE, Share, at_use, check, spread
from core.step import Batch, Metrics, Prepare, State, Step, make_step, objective
from core.targets import LABELS, Targets

ENGINES = ("auto", "eager", "compiled", "graphed")
Done = Callable[[], bool | None]  # after a step: whether to end here
OFF = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")  # variables that make torch.compile give back what it got
REPAYS = 2e14  # FLOPs of a cell from which compiling pays on a CPU: docs/results/cpu.md, "Engines"


def resolve(name: str, device: str, work: float = 0.0) -> tuple[str, str]:
    """The engine that `name` means on this device ("cpu" or "cuda"), and why.

    work: FLOPs of training one cell. Raises InputError for an engine that is unknown or not to be had.
    """
    found, why = _resolved(choose("engine", name, ENGINES), device, work)
    if found != "eager" and (off := next((name for name in OFF if os.environ.get(name) == "1"), None)):
        raise InputError(f"engine '{found}' needs torch.compile, which {off}=1 turns off; unset it, or pass eager")
    return found, why


def _resolved(name: str, device: str, work: float) -> tuple[str, str]:
    if name == "graphed" and device != "cuda":
        raise InputError("engine 'graphed' is a CUDA graph and needs --device cuda; pass --engine compiled or eager")
    if name != "auto":
        return name, "as asked"
    if device == "cuda":
        return "graphed", "no host work between steps"
    if work >= REPAYS:
        return "compiled", f"{work:.0e} FLOPs a cell repay compiling"
    return "eager", f"{work:.0e} FLOPs a cell would not repay compiling"


def build(
    config: Config,
    ops: Ops,
    prepare: Prepare,
    dtype: torch.dtype,
    optimizer: Optimizer,
    engine: str,
    regions: bool = True,
    share: Share = ALONE,
    targets: Targets = LABELS,
) -> Step:
    """The training step of a model under an engine.

    regions: compile the blocks as one function, so that compiling does not grow with the depth. share: of a step by
    several processes, this one's. targets: what of a batch is learned.
    """
    check(ops, share)
    compiled = engine != "eager"
    mark = torch.compiler.nested_compile_region if compiled and regions and config.depth > 2 else _same
    layout, blocks = shapes(config, ops), of_blocks(config)
    use = at_use(layout, share, blocks)
    local = objective(config, ops, prepare, dtype, lambda block: mark(use(block)), share.key, targets)
    loss = spread(local, layout, share, blocks)
    return make_step(loss, optimizer, ops, *((_compile, _compile_on_cuda) if compiled else ()))


def _same(fn: Callable[..., Any]) -> Callable[..., Any]:
    return fn


def _compile(fn: Callable[..., Any]) -> Callable[..., Any]:
    """One graph, static shapes; a graph break is an error."""
    return torch.compile(fresh(fn), fullgraph=True, dynamic=False)


def _compile_on_cuda(update: Callable[..., Any]) -> Callable[..., Any]:
    """On a CPU, compiling an update of AdamW takes as long as compiling the loss, and makes it no faster (4.2 M
    parameters: 37 s of 67 s)."""
    compiled = _compile(update)
    return lambda trained, gradients, state, count: (compiled if count.is_cuda else update)(
        trained, gradients, state, count
    )


def refuse_breaks(what: str, fn: Callable[..., Any], *args: Any) -> None:
    """InputError, which begins with `what`, for a function that torch.compile cannot trace as one graph."""
    try:
        torch.compile(fresh(fn), fullgraph=True, dynamic=False, backend="eager")(*args)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise InputError(
            f"{what} cannot be traced as one graph ({said(error)}); pass --engine eager, or take out what breaks it"
        ) from error


class Stepwise:
    """The loop of the engines eager and compiled: the host issues every step."""

    def __init__(self, step: Step, split: Split, size: int, device: torch.device, share: Share = ALONE) -> None:
        self._step, self._split, self._size, self._device = step, split, size, device
        self._share = share

    def warm_up(self, state: State) -> None:
        """Compile, if need be: one step, whose result is thrown away."""
        order = torch.arange(self._size, device=self._split.images.device)
        for batch in self._batches(order):
            self._step(state, batch)

    def epoch(self, state: State, order: Tensor, done: Done = lambda: None) -> tuple[State, Metrics]:
        """A step for every whole batch of this order [n]; `done` is called when each was issued, and the epoch ends
        there if it returns True. The metrics are [steps]."""
        metrics = []
        for batch in self._batches(order):
            state, measured = self._step(state, batch)
            metrics.append(measured)
            if done():
                break
        return state, Metrics(*(torch.stack(column) for column in zip(*metrics, strict=True)))

    def _batches(self, order: Tensor) -> Iterator[Batch]:
        rows, size = self._share.rows(order, self._size), self._size // self._share.world
        return batches(self._split, rows, size, self._device)


class Graphed:
    """The loop of the engine graphed: a step captured once as a CUDA graph over static buffers, and replayed.

    State, order, position and metrics lie in buffers on the device. A replay reads the position, gathers its batch
    (or takes the one streamed into a buffer), writes the new state over the old one and advances the position, so
    that an epoch of resident data is replays with no host work between them.

    capture: body -> function that runs it again.
    """

    def __init__(
        self,
        step: Step,
        split: Split,
        size: int,
        device: torch.device,
        capture: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
    ) -> None:
        steps, here = len(split.labels) // size, resident(split, device) or device.type == "cpu"
        self._step, self._split, self._size, self._device = step, split, size, device
        self._capture = capture or _cuda_graph
        self._order = torch.zeros(steps, size, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._metrics = torch.zeros(steps, len(Metrics._fields), dtype=torch.float64, device=device)
        self._streamed = None if here else Split(*(torch.zeros_like(t[:size], device=device) for t in split))
        self._state: State | None = None
        self._replay: Callable[[], None] | None = None

    def warm_up(self, state: State) -> None:
        """Compile and capture."""
        self._start(state)
        if self._replay is None:
            with _on_side_stream(self._device):
                for _ in range(3):
                    self._position.zero_()
                    self._advance()
            self._position.zero_()
            self._replay = self._capture(self._advance)

    def epoch(self, state: State, order: Tensor, done: Done = lambda: None) -> tuple[State, Metrics]:
        """A step for every whole batch of this order [n], at most an epoch's; `done` is called when each replay was
        issued, and the epoch ends there if it returns True. The metrics are [steps]."""
        if self._replay is None:
            self.warm_up(state)
        assert self._replay is not None
        self._start(state)
        steps = len(order) // self._size
        self._order[:steps].copy_(order[: steps * self._size].view(steps, self._size))
        ran = 0
        for batch in batches(self._split, order, self._size, self._device) if self._streamed else [()] * steps:
            for static, streamed in zip(self._streamed or (), batch, strict=True):
                static.copy_(streamed)
            self._replay()
            ran += 1
            if done():
                break
        return tree_map(torch.clone, self._state), Metrics(*self._metrics[:ran].clone().unbind(1))

    def _start(self, state: State) -> None:
        if self._state is None:
            self._state = tree_map(torch.clone, state)
        else:
            _overwrite(self._state, state)
        self._position.zero_()

    def _advance(self) -> None:
        """What is captured: one step."""
        assert self._state is not None
        index = self._order.index_select(0, self._position)[0]
        batch = gather(self._split, index) if self._streamed is None else self._streamed
        state, measured = self._step(self._state, batch)
        row = torch.stack([value.double() for value in measured])
        self._metrics.index_copy_(0, self._position, row[None])
        _overwrite(self._state, state)
        self._position += 1


Loop = Stepwise | Graphed


def loop(engine: str, step: Step, split: Split, size: int, device: torch.device, share: Share = ALONE) -> Loop:
    """The loop of an engine over a training split, batches of `size` images; of several processes, over this one's
    share of them (not graphed)."""
    if engine == "graphed":
        return Graphed(step, split, size, device)
    return Stepwise(step, split, size, device, share)


def _overwrite(old: State, new: State) -> None:
    """Copy the new state over the old one; what the new one keeps of the old in another place is saved first."""
    held = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(old)}

    def safe(mine: Tensor, other: Tensor) -> Tensor:
        return other.clone() if other is not mine and other.untyped_storage().data_ptr() in held else other

    new = tree_map(safe, old, new)
    for mine, other in ((old[:2], new[:2]), (old[2:], new[2:])):  # floats, integers: one launch for each kind
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
