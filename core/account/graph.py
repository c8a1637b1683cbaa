"""What a training step costs before it runs: FLOPs, bytes kept for the backward pass, peak bytes, graphs.

Everything runs on fake tensors (shapes and storages without data), on a CPU whatever the device of the study, so a
model of any size is accounted for in seconds. Scratch memory inside a kernel is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from core import vit
from core.engine import fresh
from core.errors import InputError, choose
from core.ops import Ops, Params
from core.optimizers import AdamW
from core.step import Aux, Batch, Objective, State, make_step, objective, start

MODES = ("train", "eval")


@dataclass(frozen=True)
class Account:
    """The account of one step (mode "train") or one forward pass ("eval") of a batch, in eager PyTorch.

    parameters: their number. flops: of matrix products and attention, two a multiply-add, backward pass included.
    kept_bytes: alive between forward and backward pass besides state and batch, each storage once.
    kept_by_op: the same by layer and operation that made it, such as "mlp.fc1 gelu".
    kept_by_block: the same by the block that reads it first: "0", "1", …, and "embed" and "head".
    state_bytes: parameters, and AdamW's moments if trained. peak_bytes: the most alive at a time, state included.
    """

    parameters: int
    flops: int
    kept_bytes: int
    kept_by_op: dict[str, int]
    kept_by_block: dict[str, int]
    state_bytes: int
    peak_bytes: int

    @property
    def kept_bytes_per_block(self) -> int:
        """Mean over the blocks."""
        blocks = [size for name, size in self.kept_by_block.items() if name.isdecimal()]
        return sum(blocks) // max(len(blocks), 1)


@dataclass(frozen=True)
class _Storage:
    bytes: int
    made: str
    block: str
    read: bool = False


@dataclass
class _Live(TorchDispatchMode):
    """Follows every storage from the operation that makes it until it is freed.

    Where in the model an operation stands is told by the parameter that was read last.
    """

    names: dict[int, str]
    storages: dict[int, _Storage] = field(default_factory=dict)
    live: int = 0
    peak: int = 0
    flops: int = 0
    layer: str = "input"
    block: str = "embed"

    def __post_init__(self) -> None:
        super().__init__()

    def add(self, tensor: Tensor, made: str) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.storages:
            return
        self.storages[storage._cdata] = _Storage(storage.nbytes(), made, self.block)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, identity: int) -> None:
        self.live -= self.storages.pop(identity).bytes
        self.names.pop(identity, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "aten":  # questions such as prim.device
            return func(*args, **(kwargs or {}))
        read = [t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        named = [self.names[identity] for identity in read if identity in self.names]
        made = f"{self.layer} {func.overloadpacket.__name__}"
        if named and func is torch.ops.aten._to_copy.default:
            made = "weights _to_copy"
        elif not func.is_view:
            self.block, self.layer = _place(named[-1]) if named else (self.block, self.layer)
            made = f"{self.layer} {func.overloadpacket.__name__}"
            for identity in read:
                if not self.storages[identity].read:
                    self.storages[identity] = replace(self.storages[identity], block=self.block, read=True)
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.add(t, made)
                if made == "weights _to_copy":
                    self.names[t.untyped_storage()._cdata] = named[0]
        return out


def _place(parameter: str) -> tuple[str, str]:
    """Block and layer of a parameter's name."""
    if parameter.startswith("blocks."):
        _, block, layer = parameter.split(".", 2)
        return block, layer.rpartition(".")[0]
    layer = parameter.removesuffix(".weight").removesuffix(".bias")
    return ("head" if layer.startswith(("head", "norm")) else "embed"), layer


@lru_cache(maxsize=256)
def account(
    config: vit.VitConfig,
    ops: Ops,
    batch: int,
    dtype: torch.dtype = torch.float32,
    mode: str = "train",
    optimizer: AdamW = AdamW(),  # noqa: B008
    image: int | None = None,
) -> Account:
    """The account of a step of `batch` uint8 images: forward pass in `dtype`, float32 state, AdamW with this clip.

    remembers: the batch brings gradient norms (see step.memory); the table they come from is not part of a step.

    Raises InputError for a batch below 1 or an unknown mode, and what the ops raise for such a model.
    """
    choose("mode", mode, MODES)
    if batch < 1:
        raise InputError(f"batch size {batch} is too small: at least 1")
    with FakeTensorMode(allow_non_fake_inputs=True):
        state, data = _inputs(config, ops, batch)
        if mode == "eval":
            state = state._replace(optimizer={})
        live = _Live({p.untyped_storage()._cdata: name for name, p in state.params.items()})
        for tensor in tree_leaves((state, data)):
            live.add(tensor, "")
        given = dict(live.storages)
        kept: list[_Storage] = []

        def watched(params: Params, batch: Batch, key: Tensor) -> tuple[Tensor, Aux]:
            result = loss(params, batch, key)
            kept.extend(s for identity, s in live.storages.items() if identity not in given)
            return result

        loss = objective(config, ops, _normalised, dtype)
        with live:
            if mode == "train":
                make_step(watched, optimizer, ops)(state, data)
            else:
                with torch.no_grad():
                    vit.forward(state.params, _normalised(data[0], None), config, ops, dtype=dtype)
    by_op, by_block = Counter[str](), Counter[str]()
    for storage in kept:
        by_op[storage.made] += storage.bytes
        by_block[storage.block] += storage.bytes
    return Account(
        parameters=vit.parameters(config, ops),
        flops=live.flops,
        kept_bytes=by_op.total(),
        kept_by_op=dict(by_op.most_common()),
        kept_by_block=dict(by_block),
        state_bytes=sum(t.nbytes for t in tree_leaves(state)),
        peak_bytes=live.peak,
    )


def _inputs(config: vit.VitConfig, ops: Ops, batch: int) -> tuple[State, Batch]:
    params = {name: torch.empty(shape) for name, shape in vit.shapes(config, ops).items()}
    images = torch.empty(batch, config.channels, config.image, config.image, dtype=torch.uint8)
    key = torch.empty(2, dtype=torch.int64)
    labels = torch.empty(batch, dtype=torch.int64)
    return start(params, AdamW(), key, ops), (images, labels)


def _normalised(images: Tensor, key: Tensor | None) -> Tensor:
    return images.float() / 255


@dataclass(frozen=True)
class Graphs:
    """A loss as the compiler sees it: operations of the forward and of the backward graph, and what goes between.

    forward, backward: modules of aten operations. kept: bytes between them by the operation that makes them, each
    storage once, parameters and batch not counted: what the min-cut partitioner keeps rather than computes again.
    """

    forward: torch.fx.GraphModule
    backward: torch.fx.GraphModule
    kept: dict[str, int]

    @property
    def kept_bytes(self) -> int:
        """All of `kept`."""
        return sum(self.kept.values())


@dataclass(frozen=True)
class Difference:
    """From one arm's graphs to another's: operations gone and new with their counts, and bytes kept more."""

    gone: dict[str, int]
    new: dict[str, int]
    kept_bytes: int


def graphs(config: vit.VitConfig, ops: Ops, batch: int, dtype: torch.dtype = torch.float32) -> Graphs:
    """The forward and the backward graph of the objective under torch.compile's decompositions and partitioner."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    found: list[Graphs] = []

    def partition(joint: torch.fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **options: Any) -> Any:
        forward, backward = min_cut_rematerialization_partition(
            joint, inputs, num_fwd_outputs=num_fwd_outputs, compiler="inductor", **options
        )
        found.append(Graphs(forward, backward, _between(forward, num_fwd_outputs)))
        return forward, backward

    backend = aot_autograd(
        fw_compiler=lambda module, _: module,
        bw_compiler=lambda module, _: module,
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        state, data = _inputs(config, ops, batch)
        params = state.params
        leaves = {name: p.requires_grad_() for name, p in params.items()}
        loss: Objective = objective(config, ops, _normalised, dtype)
        torch.compile(fresh(loss), fullgraph=True, dynamic=False, backend=backend)(leaves, data, state.key)
    return found[0]


def kept_bytes_compiled(config: vit.VitConfig, ops: Ops, batch: int, dtype: torch.dtype = torch.float32) -> int:
    """`graphs(...).kept_bytes`; of more than three blocks two and three are traced: the others are like the third."""

    def kept(depth: int) -> int:
        return graphs(replace(config, depth=depth), ops, batch, dtype).kept_bytes

    if config.depth <= 3:
        return kept(config.depth)
    two, three = kept(2), kept(3)
    return three + (config.depth - 3) * (three - two)


def _between(forward: torch.fx.GraphModule, outputs: int) -> dict[str, int]:
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
        kept[_name(node)] += value.untyped_storage().nbytes()
    return dict(kept.most_common())


def _viewed(node: Any) -> Any:
    """What this node is a view of, if it is one."""
    source = node.args[0] if node.args and _called(node) == "getitem" else node
    return source.args[0] if getattr(source.target, "is_view", False) else None


def _called(node: Any) -> str:
    """The name of the operation, "getitem" for a part of its result."""
    return getattr(getattr(node.target, "overloadpacket", node.target), "__name__", str(node.target))


def _name(node: Any) -> str:
    return _called(node.args[0] if _called(node) == "getitem" else node)


def difference(first: Graphs, second: Graphs) -> Difference:
    """What the second arm's graphs have that the first's have not, and the other way round."""
    counts = [
        Counter(_called(n) for g in (arm.forward, arm.backward) for n in g.graph.nodes if n.op == "call_function")
        for arm in (first, second)
    ]
    gone, new = counts[0] - counts[1], counts[1] - counts[0]
    for parts in (gone, new):
        del parts["getitem"]
    return Difference(dict(gone.most_common()), dict(new.most_common()), second.kept_bytes - first.kept_bytes)
