"""Batches of a split, on the device: gathered there, or read from the host's memory map one batch ahead."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.data.splits import Split

LITTLE = 1 << 18  # bytes of a batch's images on a CPU


def resident(split: Split, device: torch.device) -> bool:
    """Whether the images lie in the memory of this CUDA device."""
    return device.type == "cuda" and split.images.is_cuda


def gather(split: Split, index: Tensor) -> tuple[Tensor, Tensor]:
    """images uint8 [B,C,S,S] and labels [B] of these rows [B], where the split lies; no synchronisation."""
    return split.images.index_select(0, index), split.labels.index_select(0, index)


def batches(split: Split, order: Tensor, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, labels) of every whole batch of this order [n], on the device.

    Images in the host's memory, or on its disk behind a memory map, are read by a thread one batch ahead, unless a
    batch is so LITTLE that handing it over takes longer; on CUDA they pass through pinned buffers and a stream of their
    own. A batch is valid until the next one is asked for.
    """
    whole = order[: len(order) // size * size]
    little = device.type == "cpu" and size * split.images[:1].nbytes <= LITTLE
    if not len(whole):
        return
    if resident(split, device) or little:
        for index in whole.split(size):
            yield gather(split, index)
    else:
        yield from _ahead(split, whole.cpu().split(size), device)


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream of all copies: each new stream would keep memory of its own."""
    return torch.cuda.Stream(device)


class _Slot(NamedTuple):
    """A host buffer for one batch. CUDA events: when the device has the batch, and when it has used it."""

    images: Tensor
    copied: torch.cuda.Event | None
    used: torch.cuda.Event | None


def _ahead(split: Split, indices: Sequence[Tensor], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    cuda = device.type == "cuda"
    stream = _copies(device) if cuda else None
    shape = (len(indices[0]), *split.images.shape[1:])
    slots = [
        _Slot(
            torch.empty(shape, dtype=split.images.dtype, pin_memory=cuda),
            *((torch.cuda.Event(), torch.cuda.Event()) if cuda else (None, None)),
        )
        for _ in range(2)
    ]
    source = split.images.numpy()

    def read(i: int) -> tuple[Tensor, Tensor]:
        slot, index = slots[i % 2], indices[i]
        if slot.copied is not None and slot.used is not None:
            slot.copied.synchronize()
            slot.used.synchronize()  # or the host would run far ahead, with a batch on the device for each step
        np.take(source, index.numpy(), axis=0, out=slot.images.numpy(), mode="clip")  # the other modes copy twice
        labels = split.labels[index]
        if slot.copied is None:
            return slot.images, labels
        with torch.cuda.stream(stream):
            batch = slot.images.to(device, non_blocking=True), labels.to(device)
            slot.copied.record()
        return batch

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, 0)
        for i in range(len(indices)):
            batch = ahead.result()
            if (event := slots[i % 2].copied) is not None:
                current = torch.cuda.current_stream(device)
                current.wait_event(event)
                for tensor in batch:
                    tensor.record_stream(current)
            if i + 1 < len(indices):
                ahead = reader.submit(read, i + 1)
            yield batch
            if (event := slots[i % 2].used) is not None:
                event.record(torch.cuda.current_stream(device))
