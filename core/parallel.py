"""One training step by several processes: each has a share of every batch and, under "fsdp", of every parameter.

A pure transform of the loss: parameters are made whole where they are used, and their gradients are summed over the
processes on the way back (SimpleFSDP, Zhang et al. 2024, arXiv 2411.00284; ZeRO, Rajbhandari et al., SC 2020, arXiv
1910.02054). The loss is a mean over images, penalties included, so the mean over the processes is that of the global
batch, whatever their number.

Shards are plain tensors and the collectives torch's functional ones, which compilers and fake tensors see as they see
any other operation. Nothing falls back: a backend without one of the three collectives raises its own error.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

from core import rng
from core.attached import attach
from core.errors import InputError
from core.ops import Carry, Ops, Params
from core.step import State

KINDS = ("ddp", "fsdp")
Shapes = Mapping[str, tuple[int, ...]]
Block = Callable[..., tuple[Tensor, Carry]]
BLOCKS = ("blocks.",)


class Share(NamedTuple):
    """What one of `world` processes, number `rank`, has of a step. sharded: whether it keeps a share of the parameters
    ("fsdp") or all of them ("ddp"). group: torch's name of the group of these processes."""

    rank: int = 0
    world: int = 1
    sharded: bool = False
    group: str = "0"

    def rows(self, order: Tensor, size: int) -> Tensor:
        """Of an order of images [n] in batches of `size`, those of this process, in batches of size / world."""
        whole = order[: len(order) // size * size]
        return whole.view(-1, self.world, size // self.world)[:, self.rank].flatten()

    def columns(self, draws: Tensor) -> Tensor:
        """Of draws [..., B] for a global batch, those for the images of this process."""
        return draws.unflatten(-1, (self.world, -1))[..., self.rank, :]

    def key(self, key: Tensor) -> Tensor:
        """What the model draws from, of each process its own: it samples, or drops, rows of its images only."""
        return key if self.world == 1 else rng.named(key, f"process {self.rank}")

    def norm(self, norms: Tensor) -> Tensor:
        """The norm of all gradients from the norms [n] of those here."""
        return (_gathered(norms, self) if self.sharded else norms).norm()


ALONE = Share()


def divided(size: int, count: int) -> int:
    """The images of a process; InputError for a global batch that the processes cannot share equally."""
    if size % count:
        near = " or ".join(str(n * count) for n in (size // count, size // count + 1) if n)
        raise InputError(f"batch size {size} is not divisible by {count} processes; pass --batch-size {near}")
    return size // count


def check(ops: Ops, share: Share) -> None:
    """InputError for what needs whole parameters where there are shards."""
    if share.sharded and (names := [part.name for part in ops.parts if part.optimizer]):
        raise InputError(
            f"{names[0]} changes the optimizer, which fsdp gives shards where it may need whole matrices; pass "
            "--parallel ddp"
        )


def shard(params: Params, share: Share) -> Params:
    """A process's shares [ceil(n / world)] of parameters of n elements, filled up with zeros; under ddp all of them."""
    if not share.sharded:
        return params
    return {name: _rows(p.flatten(), share.world)[share.rank].clone() for name, p in params.items()}


def whole(params: Params, shapes: Shapes, share: Share, done: Callable[[], None] = lambda: None) -> Params:
    """Whole parameters, equal in all processes, of what each has of them: one collective for those that are trained,
    and one for the others. Gradients are summed over the processes; `done` is called then."""
    out: Params = {}
    for trained in (True, False):
        some = {name: p for name, p in params.items() if p.requires_grad == trained}
        if not some:
            continue
        if share.sharded:
            out |= _unsharded(some, shapes, share, done)
        else:
            out |= dict(zip(some, _Replicated.apply(share, *some.values()), strict=True)) if trained else some
    return out


def _unsharded(params: Params, shapes: Shapes, share: Share, done: Callable[[], None]) -> Params:
    flat = torch.cat(list(params.values()))

    def gradient(G: Tensor) -> tuple[Tensor]:
        done()
        return (_scattered(G, share),)

    rows = attach(_gathered(flat.detach(), share), [flat], [], gradient).view(share.world, -1)
    parts = rows.split([len(p) for p in params.values()], 1)
    shaped = ((name, shapes[name], part) for name, part in zip(params, parts, strict=True))
    return {name: part.contiguous().view(-1)[: prod(shape)].view(shape) for name, shape, part in shaped}


def summed(tensor: Tensor, share: Share) -> Tensor:
    """The sum of all processes' tensors."""
    ops = torch.ops._c10d_functional
    return tensor if share.world == 1 else ops.wait_tensor(ops.all_reduce(tensor, "sum", share.group))


def shard_state(state: State, share: Share) -> State:
    """A process's share of a state whose optimizer's is a nest of parameters by name."""
    if not share.sharded:
        return state
    params, optimizer = tree_map(lambda tree: shard(tree, share), state[:2], is_leaf=_named)
    return state._replace(params=params, optimizer=optimizer)


def whole_state(state: State, shapes: Shapes, share: Share) -> State:
    """The state of which each process has a share."""
    if not share.sharded:
        return state
    params, optimizer = tree_map(lambda tree: whole(tree, shapes, share), state[:2], is_leaf=_named)
    return state._replace(params=params, optimizer=optimizer)


def _named(node: Any) -> bool:
    return isinstance(node, dict)


class _Replicated(torch.autograd.Function):
    """Parameters that every process has, their gradients summed in one collective."""

    @staticmethod
    def forward(share: Share, *params: Tensor) -> tuple[Tensor, ...]:
        return tuple(p.view_as(p) for p in params)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.share = inputs[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        total = summed(torch.cat([G.flatten() for G in gradients]), ctx.share)
        parts = total.split([G.numel() for G in gradients])
        return None, *(part.view(G.shape) for part, G in zip(parts, gradients, strict=True))


def at_use(shapes: Shapes, share: Share, blocks: tuple[str, ...] = BLOCKS) -> Callable[[Block], Block]:
    """Makes the function of a block one of a process's share of the block's parameters (see `core.vit.blockwise`).

    shapes: of all parameters, by full name. blocks: how the names of those of blocks begin. Raises InputError where
    blocks differ in a parameter's shape.
    """
    own_shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if name.startswith(blocks):
            rest = name.split(".", 2)[2]
            if own_shapes.setdefault(rest, shape) != shape:
                raise InputError(
                    f"{name} has the shape {shape}, other blocks have {own_shapes[rest]}; pass no --parallel"
                )

    def using(block: Block) -> Block:
        def run(own: Params, *inputs: Any) -> tuple[Tensor, Carry]:
            return _using(own, own_shapes, share, lambda params: block(params, *inputs))

        return run

    return _same if share.world == 1 else using


def spread(
    loss: Callable[..., tuple[Tensor, Tensor]], shapes: Shapes, share: Share, blocks: tuple[str, ...] = BLOCKS
) -> Callable[..., Any]:
    """The objective of the global batch (see `core.step.objective`) from that of a process's images: the same function
    of a process's share of the parameters, whose value is the mean over the processes. The blocks' parameters are left
    to `at_use`."""

    def of_all(params: Params, batch: Any, key: Tensor) -> tuple[Tensor, Tensor]:
        inner = {name: p for name, p in params.items() if name.startswith(blocks)}
        outer = {name: p for name, p in params.items() if name not in inner}
        value, aux = _using(outer, shapes, share, lambda params: loss(params | inner, batch, key))
        means = summed(torch.cat((value.detach().double()[None], aux)), share) / share.world
        mean = attach(means[0].to(value.dtype), [value], [], lambda G: (G / share.world,))
        return mean, torch.cat((means[1:3], means[3:] * share.world))  # the last are counts

    return loss if share.world == 1 else of_all


def _using(own: Params, shapes: Shapes, share: Share, fn: Callable[[Params], Any]) -> Any:
    """fn(whole parameters). What autograd keeps of these is let go, and gathered a second time in the backward pass;
    where a compiler makes the graphs, its partitioner decides what is kept."""
    if not share.sharded or torch.compiler.is_compiling():
        return fn(whole(own, shapes, share))
    again: Params = {}
    params = whole(own, shapes, share, again.clear)
    names = {p.untyped_storage()._cdata: name for name, p in params.items()}
    shards = {name: p.detach() for name, p in own.items()}

    def pack(tensor: Tensor) -> Any:
        name = names.get(tensor.untyped_storage()._cdata)
        return tensor if name is None else (name, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if not again:
            again.update(whole(shards, shapes, share))
        name, *view = kept
        return again[name].as_strided(*view)

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return fn(params)
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        raise InputError(
            "an optimization here uses torch.func in its forward pass, where fsdp's shards cannot be told from what it "
            "keeps; pass --engine compiled, or --parallel ddp"
        ) from error


def _rows(flat: Tensor, count: int) -> Tensor:
    """[n] -> [count, ceil(n / count)], filled up with zeros."""
    return F.pad(flat, (0, -len(flat) % count)).view(count, -1)


def _same(block: Block) -> Block:
    return block


def _gathered(tensor: Tensor, share: Share) -> Tensor:
    """[n] of every process, one after the other: [world · n]."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_gather_into_tensor(tensor, share.world, share.group))


def _scattered(tensor: Tensor, share: Share) -> Tensor:
    """Of the sum of all processes' [world · n], this process's [n]."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.reduce_scatter_tensor(tensor.contiguous(), "sum", share.world, share.group))
