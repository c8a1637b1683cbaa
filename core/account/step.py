"""What a training step costs before it runs: FLOPs, bytes kept for the backward pass, peak bytes.

Everything runs on fake tensors (shapes and storages without data), on a CPU whatever the device of the study, so a
model of any size is accounted for in seconds. Scratch memory inside a kernel is not seen.
"""

from __future__ import annotations

import re
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core import model
from core.account.flops import flops
from core.errors import InputError, choose
from core.foreign.model import Foreign
from core.ops import Ops, Params
from core.optimizers import AdamW, Optimizer
from core.parallel import ALONE, Share, at_use, shard, spread, whole
from core.step import Batch, State, make_step, objective, start
from core.targets import LABELS, Targets

MODES = ("train", "eval")
ADAMW = AdamW()


@dataclass(frozen=True)
class Account:
    """The account of one step (mode "train") or one forward pass ("eval") of a batch, in eager PyTorch.

    parameters: their number. flops: see `core.account.flops`, backward pass included.
    kept_bytes: alive between forward and backward pass besides state and batch, each storage once.
    kept_by_op: the same by layer and operation that made it, such as "mlp.fc1 gelu".
    kept_by_block: the same by the block that reads it first: "0", "1", …, and "embed" and "head".
    Of several processes it is one's, and so are the FLOPs.
    state_bytes: parameters, and the optimizer's state if trained. peak_bytes: the most alive at a time, state included.
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
    made: str  # "": given
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

    def add(self, tensor: Tensor, made: str) -> int:
        """The storage's identity."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.storages:
            self.storages[storage._cdata] = _Storage(storage.nbytes(), made, self.block)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, storage._cdata)
        return storage._cdata

    def _free(self, identity: int) -> None:
        self.live -= self.storages.pop(identity).bytes
        self.names.pop(identity, None)

    def naming_block(self, block: Callable[..., Any]) -> Callable[..., Any]:
        """The function of a block, which makes the whole parameters that it is given known by their names."""

        def run(own: Params, *inputs: Any) -> Any:
            self._name({f"blocks.{self.block}.{rest}": tensor for rest, tensor in own.items()})
            return block(own, *inputs)

        return run

    def naming(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        """The same of the loss, which starts where the input is."""

        def run(params: Params, *inputs: Any) -> Any:
            self._name(params)
            self.block, self.layer = "embed", "input"
            return loss(params, *inputs)

        return run

    def _name(self, params: Params) -> None:
        for name, tensor in params.items():
            self.names.setdefault(tensor.untyped_storage()._cdata, name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a question, such as prim.device
            return func(*args, **kwargs)
        if func is torch.ops._c10d_functional.wait_tensor.default:  # a fake one would be another tensor
            return args[0]
        # what nothing has made here was there before, such as a scorer's network
        read = [self.add(t, "") for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        named = [self.names[identity] for identity in read if identity in self.names]
        operation = func.overloadpacket.__name__
        made = f"{self.layer} {operation}"
        if named and func is torch.ops.aten._to_copy.default:
            made = "weights _to_copy"
        elif not func.is_view:
            self.block, self.layer = _place(named[-1]) if named else (self.block, self.layer)
            made = f"{self.layer} {operation}"
            for identity in read:
                if not self.storages[identity].read:
                    self.storages[identity] = replace(self.storages[identity], block=self.block, read=True)
        out = func(*args, **kwargs)
        self.flops += flops(func, args, kwargs, out)
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                identity = self.add(t, made)
                if made == "weights _to_copy":
                    self.names[identity] = named[0]
        return out


def _place(parameter: str) -> tuple[str, str]:
    """Block and layer of a parameter's name: "blocks.3.attn.qkv.weight" -> "3", "attn.qkv"."""
    if found := re.match(r"\D*\.(\d+)\.(.*)", parameter):
        return found[1], found[2].rpartition(".")[0]
    layer = parameter.removesuffix(".weight").removesuffix(".bias")
    return ("head" if layer.startswith(("head", "norm")) else "embed"), layer


@lru_cache(maxsize=256)
def account(
    config: model.Config,
    ops: Ops,
    batch: int,
    dtype: torch.dtype = torch.float32,
    mode: str = "train",
    optimizer: Optimizer = ADAMW,
    image: int | None = None,
    share: Share = ALONE,
    targets: Targets = LABELS,
) -> Account:
    """The account of a step of `batch` uint8 images: forward pass in `dtype`, float32 state.

    image: the images' side as stored, where the ops resize them; None: the config's. share: of several processes, whose
    step it is; `batch` are then the images of that process. targets: what of them is learned.

    Raises InputError for a batch below 1 or an unknown mode, and what the ops raise for such a model.
    """
    choose("mode", mode, MODES)
    if batch < 1:
        raise InputError(f"batch size {batch} is too small: at least 1")
    with FakeTensorMode(allow_non_fake_inputs=True):
        state, data = inputs(config, ops, batch, optimizer, image, share)
        if mode == "eval":
            state = state._replace(optimizer={})
        live = _Live({p.untyped_storage()._cdata: name for name, p in state.params.items()})
        for tensor in tree_leaves((state, data)):
            live.add(tensor, "")
        kept: list[_Storage] = []
        layout, blocks = model.shapes(config, ops), model.of_blocks(config)
        use = at_use(layout, share, blocks)
        local = objective(config, ops, normalised, dtype, lambda block: use(live.naming_block(block)), targets=targets)
        loss = spread(live.naming(local), layout, share, blocks)

        def watched(params: Params, batch: Batch, key: Tensor) -> tuple[Tensor, Tensor]:
            result = loss(params, batch, key)
            kept.extend(s for s in live.storages.values() if s.made)
            return result

        with live:
            if mode == "train":
                make_step(watched, optimizer, ops)(state, data)
            else:
                with torch.no_grad():
                    params = whole(state.params, layout, share)
                    model.bind(config, ops, dtype)(params, normalised(data[0], None), None)
    by_op, by_block = Counter[str](), Counter[str]()
    for storage in kept:
        by_op[storage.made] += storage.bytes
        by_block[storage.block] += storage.bytes
    return Account(
        parameters=model.parameters(config, ops),
        flops=live.flops,
        kept_bytes=by_op.total(),
        kept_by_op=dict(by_op.most_common()),
        kept_by_block=dict(by_block),
        state_bytes=sum(t.nbytes for t in tree_leaves(state)),
        peak_bytes=live.peak,
    )


def planned(
    config: model.Config,
    ops: Ops,
    batch: int,
    dtype: torch.dtype = torch.float32,
    optimizer: Optimizer = ADAMW,
    image: int | None = None,
    share: Share = ALONE,
    targets: Targets = LABELS,
) -> Ops:
    """The ops as planned for such a step: see `account`, `Ops.planned`. Raises InputError for what no plan can do."""
    if isinstance(config, Foreign):
        return ops  # which takes no plans
    rest = optimizer, image, share, targets
    return ops.planned(config, lambda ops, config: account(config, ops, batch, dtype, "train", *rest))


def inputs(
    config: model.Config,
    ops: Ops,
    batch: int,
    optimizer: Optimizer = ADAMW,
    image: int | None = None,
    share: Share = ALONE,
) -> tuple[State, Batch]:
    """State and batch of a step, without values."""
    params = shard({name: torch.empty(shape) for name, shape in model.shapes(config, ops).items()}, share)
    side = image or config.image
    images = torch.empty(batch, config.channels, side, side, dtype=torch.uint8)
    key = torch.empty(2, dtype=torch.int64)
    return start(params, optimizer, key, ops), (images, torch.empty(batch, dtype=torch.int64))


def normalised(images: Tensor, key: Tensor | None) -> Tensor:
    """What stands for the preparation of images: no augmentation."""
    return images.float() / 255
