"""A loss as torch.compile sees it: its forward and its backward graph, and what an arm changes in them."""

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from core.account.step import inputs, normalised
from core.code import fresh
from core.foreign.model import Foreign
from core.model import Config
from core.ops import Ops
from core.step import objective

PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2)}  # where their factors stand
_FUSED = re.compile(  # a compiler makes no kernel of their own of these, nor of views and of what these tags mark
    "getitem|full|iota|empty|scalar_tensor|clone|_to_copy|convert_element_type|cat|rev|gather|(_unsafe_)?index|"
    "constant_pad_nd|(select|slice|diagonal)_scatter"
)
_FUSED_TAGS = {torch.Tag.pointwise, torch.Tag.reduction}


class Operation(NamedTuple):
    """One that a compiler makes a kernel of; sizes: of a product of [m,k] and [k,n] m, k, n."""

    name: str
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Graphs:
    """Operations of the forward and the backward graph with their counts (without what is fused into others), and kept:
    bytes that go between the graphs by the operation that makes them, each storage once, parameters and batch
    not counted: what the min-cut partitioner keeps rather than computes again."""

    forward: Counter[Operation]
    backward: Counter[Operation]
    kept: Counter[str]

    @property
    def kept_bytes(self) -> int:
        """All of `kept`."""
        return self.kept.total()


def trace(config: Config, ops: Ops, batch: int, dtype: torch.dtype = torch.float32) -> Graphs:
    """The graphs of the objective under torch.compile's decompositions and partitioner.

    Of more than three blocks two and three are traced, the others being like the third; all, if each may be another.
    """
    if config.depth <= 3 or isinstance(config, Foreign) or not ops.alike(config.depth):
        return _traced(config, ops, batch, dtype)
    two, three = (_traced(replace(config, depth=depth), ops, batch, dtype) for depth in (2, 3))
    more = config.depth - 3

    def deep(a: Counter[Any], b: Counter[Any]) -> Counter[Any]:
        return +Counter({key: b[key] + more * (b[key] - a[key]) for key in a | b})

    return Graphs(deep(two.forward, three.forward), deep(two.backward, three.backward), deep(two.kept, three.kept))


def _traced(config: Config, ops: Ops, batch: int, dtype: torch.dtype) -> Graphs:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    found: list[Graphs] = []

    def partition(joint: torch.fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **options: Any) -> Any:
        parts = min_cut_rematerialization_partition(
            joint, inputs, num_fwd_outputs=num_fwd_outputs, compiler="inductor", **options
        )
        forward, backward = (_operations(part) for part in parts)
        found.append(Graphs(forward, backward, _between(parts[0], num_fwd_outputs)))
        return parts

    backend = aot_autograd(
        fw_compiler=lambda module, _: module,
        bw_compiler=lambda module, _: module,
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        state, data = inputs(config, ops, batch)
        leaves = {name: p.requires_grad_(not ops.frozen(name)) for name, p in state.params.items()}
        loss = objective(config, ops, normalised, dtype)
        torch.compile(fresh(loss), fullgraph=True, dynamic=False, backend=backend)(leaves, data, state.key)
    return found[0]


def _operations(graph: torch.fx.GraphModule) -> Counter[Operation]:
    found = Counter[Operation]()
    for node in graph.graph.nodes:
        target, name = node.target, _called(node)
        fused = getattr(target, "is_view", False) or _FUSED_TAGS & set(getattr(target, "tags", ()))
        if node.op != "call_function" or fused or _FUSED.fullmatch(name):
            continue
        sizes: tuple[int, ...] = ()
        if name in PRODUCTS:
            a, b = (node.args[i].meta["val"].shape for i in PRODUCTS[name])
            sizes = (*map(int, a), int(b[-1]))
        found[Operation(name, sizes)] += 1
    return found


def _between(forward: torch.fx.GraphModule, outputs: int) -> Counter[str]:
    """Bytes of the forward graph's outputs beyond the loss's own, by operation."""
    kept, seen = Counter[str](), set()
    node: Any
    for node in forward.graph.output_node().args[0][outputs:]:  # type: ignore
        while (base := _viewed(node)) is not None:
            node = base
        value = node.meta.get("val")
        if node.op == "placeholder" or node in seen or not isinstance(value, Tensor):
            continue
        seen.add(node)
        kept[_called(node.args[0] if _called(node) == "getitem" else node)] += value.untyped_storage().nbytes()
    return kept


def _viewed(node: Any) -> Any:
    """What this node is a view of, if it is one."""
    source = node.args[0] if node.args and _called(node) == "getitem" else node
    return source.args[0] if getattr(source.target, "is_view", False) else None


def _called(node: Any) -> str:
    """The name of the operation, "getitem" for a part of its result."""
    return getattr(getattr(node.target, "overloadpacket", node.target), "__name__", str(node.target))


class Resized(NamedTuple):
    """Products of the same name that differ in one size alone."""

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class Change:
    """From one graph to another: products of another size, other operations gone and new, all with their counts."""

    resized: Counter[Resized]
    gone: Counter[str]
    new: Counter[str]


@dataclass(frozen=True)
class Difference:
    """From one arm's graphs to another's, and the bytes that are kept between them more (or, below 0, less)."""

    forward: Change
    backward: Change
    kept_bytes: int


def difference(first: Graphs, second: Graphs) -> Difference:
    """What the second arm's graphs have that the first's have not, and the other way round."""
    forward, backward = _change(first.forward, second.forward), _change(first.backward, second.backward)
    return Difference(forward, backward, second.kept_bytes - first.kept_bytes)


def _change(first: Counter[Operation], second: Counter[Operation]) -> Change:
    gone, new, resized = first - second, second - first, Counter[Resized]()
    for old in list(gone):
        for other in list(new):
            differing = [pair for pair in zip(old.sizes, other.sizes, strict=False) if pair[0] != pair[1]]
            if old.name == other.name and len(differing) == 1 and (count := min(gone[old], new[other])):
                resized[Resized(old.name, *differing[0])] += count
                gone[old] -= count
                new[other] -= count
    return Change(resized, _by_name(gone), _by_name(new))


def _by_name(operations: Counter[Operation]) -> Counter[str]:
    names = Counter[str]()
    for operation, count in operations.items():
        names[operation.name] += count
    return +names


def sentence(change: Difference) -> str:
    """Such as "backward: 36 mm of 12,608 rows become 3,782; forward: + 36 sort; kept -3.2 GB"."""
    parts = []
    for name, graph in (("forward", change.forward), ("backward", change.backward)):
        said = [f"{n} {r.name} of {r.before:,} rows become {r.after:,}" for r, n in graph.resized.most_common()]
        said += [f"{sign} {_listed(counts)}" for sign, counts in (("-", graph.gone), ("+", graph.new)) if counts]
        parts += [f"{name}: {', '.join(said)}"] if said else []
    return "; ".join([*parts, f"kept {change.kept_bytes / 1e9:+.2f} GB"])


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name.strip('_')}" for name, count in counts.most_common(4)) + " …" * (len(counts) > 4)
