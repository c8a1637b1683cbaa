"""Several processes that train one study's cells together (torchrun --nproc-per-node N ablations/run.py --parallel …).

The first leads: it alone has the study's folder and the terminal, decides what is trained next, and tells the others,
which follow. What they tell each other goes through a group of its own, on the host.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from core.errors import InputError, choose, said, within
from core.parallel import ALONE, KINDS, Share

T = TypeVar("T")
STEP = timedelta(minutes=10)  # that one may wait for another within a step: one may compile, another not
MOST = 2**20  # processes of a cell
TOLD = timedelta(days=7)  # that one may wait to be told


def started() -> int:
    """How many processes torchrun started for this run; 1 without it, and where what is set cannot be torchrun's."""
    count = os.environ.get("WORLD_SIZE", "1")
    return max(int(count), 1) if count.isdecimal() else 1


def leads() -> bool:
    """Whether this process is the first, or the only one."""
    return started() == 1 or os.environ.get("RANK", "0") == "0"


def named() -> str:
    """ "process 3: ", "" for the leader."""
    return "" if leads() else f"process {os.environ['RANK']}: "


def check(device: str) -> None:
    """InputError where torchrun would have set more than is set, and for more processes on this machine than it has
    GPUs."""
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        if not (text := os.environ.get(name, "")) or not (text.isdecimal() or name == "MASTER_ADDR"):
            raise InputError(
                f"WORLD_SIZE is {started()}, as torchrun sets it, and {name} is '{text}'; unset WORLD_SIZE, or write "
                f"torchrun --nproc-per-node {started()} ablations/run.py …"
            )
    here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    for name, most in (("RANK", started() - 1), ("LOCAL_RANK", here - 1), ("MASTER_PORT", 2**16 - 1)):
        within(name, int(os.environ[name]), int(name == "MASTER_PORT"), most)
    if device == "cuda" and here > gpus:
        raise InputError(f"{here} processes on a machine with {gpus} GPUs; pass --nproc-per-node {max(gpus, 1)}")


@contextmanager
def joined(device: str, kind: str | None) -> Iterator[None]:
    """Within, this process is one of those that torchrun started, each on a GPU of its own if `device` is "cuda".
    InputError without --parallel `kind`, before it waits for others that nobody may have started."""
    if started() == 1:
        yield
        return
    check(device)
    count(kind, None, present=True)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=STEP)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise InputError(f"{started()} processes do not meet at {where} ({said(error)}); start all of them") from error
    _host()
    try:
        yield
    except RuntimeError as error:
        if lost(error):
            leave_after(error)
        raise
    finally:
        _host.cache_clear()
        dist.destroy_process_group()


@cache
def _host() -> Any:
    return dist.new_group(backend="gloo", timeout=TOLD)


def count(kind: str | None, asked: int | None, present: bool) -> int | None:
    """How many processes train a cell under --parallel `kind`; None without it. InputError for an unknown kind, for a
    number below 1 and, if they must be present, for another than torchrun started.
    """
    if asked is not None:
        within("processes", asked, 1, MOST)
    if kind is None:
        if asked is not None or (present and started() > 1):
            raise InputError(f"{asked or started()} processes without --parallel; pass --parallel ddp, or fsdp")
        return None
    choose("parallel", kind, KINDS)
    if present and asked not in (None, started()):
        raise InputError(
            f"--processes {asked}, but {started()} started; write torchrun --nproc-per-node {asked} ablations/run.py …"
        )
    return asked or started()


def share(kind: str | None, count: int | None) -> Share:
    """This process's share of a step by `count` under --parallel `kind`; the first one's where none runs."""
    if count is None or count == 1:
        return ALONE
    group = dist.group.WORLD
    return Share(
        0 if group is None else group.rank(), count, kind == "fsdp", "0" if group is None else group.group_name
    )


def told(value: Any = None) -> Any:
    """The leader's value, in all processes; a single one's own. Of the others it waits for the leader's."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_host())
    return box[0]


def lead(*order: Any) -> None:
    """Tell the others what comes next; nothing, where this process is one of them."""
    if leads():
        told(order)


def in_turn(fn: Callable[[], T]) -> T:
    """What fn gives: the leader's first, so that what it fetches and caches is there for the others."""
    if not leads():
        if not told():
            raise InputError("the first process could not prepare the study")
        return fn()
    ready = False
    try:
        result = fn()
        ready = True
        return result
    finally:
        told(ready)


def lost(error: BaseException) -> bool:
    """Whether an error tells that another process is gone or does not answer."""
    gone = ("gloo/transport", "Connection closed by peer", "Connection reset", "Timed out")
    text = isinstance(error, RuntimeError) and any(words in str(error) for words in gone)
    return dist.is_initialized() and (text or isinstance(error, dist.DistError))


def leave_after(error: BaseException) -> None:
    """ConnectionError where others may not be where this process is after an error; nothing for a single one."""
    if dist.is_initialized():
        raise ConnectionError(
            f"the processes are no longer together ({type(error).__name__}: {error}); the same command continues"
        ) from error


@contextmanager
def leading() -> Iterator[None]:
    """At the end the others are told that there is nothing left."""
    try:
        yield
    finally:
        with suppress(RuntimeError):  # of processes that are gone
            told()


def agree(configuration: dict[str, Any]) -> None:
    """InputError, in all processes, if they were started with different configurations."""
    if not dist.is_initialized():
        return
    found: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, configuration, group=_host())
    for rank, other in enumerate(found):
        if keys := [k for k in {**found[0], **other} if found[0].get(k) != other.get(k)]:
            changes = ", ".join(f"{k} {found[0].get(k)!r} and {other.get(k)!r}" for k in keys)
            raise InputError(f"processes 0 and {rank} disagree about {changes}; start all with the same command")


class _Unheard:
    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


UNHEARD: Any = _Unheard()
"""Whoever records or shows what a follower does: nobody."""
