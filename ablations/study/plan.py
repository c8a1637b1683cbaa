"""What every arm will cost, accounted for on fake tensors before anything runs: run.py --plan."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ablations.study.cells import Prepared
from ablations.study.evaluation import BATCH
from core import model
from core.account import graphs
from core.errors import InputError
from core.step import objective

Entry = dict[str, Any]

WORKSPACE = 64 << 20  # cuBLAS's own memory: 32 MiB a stream on Hopper, two streams
CONTEXT = 512 << 20  # what the driver, kernels and libraries take of a GPU before the first tensor
FRAGMENTED = 0.05  # of all else: memory that the allocator holds and cannot give
_LARGEST = 2**20


def entries(cells: Sequence[Prepared], compiled: bool = False, budget: int | None = None) -> Iterator[Entry]:
    """The account of every arm in turn; InputError, with the arm's name, for one that cannot be built or that the
    device would refuse.

    compiled: also `kept_bytes_compiled`, what torch.compile's partitioner keeps, and `graphs`, what the arm changes in
    the first arm's forward and backward graph. With a budget in bytes also whether
    what the recipe's batch needs is within it, and the largest batch that is (0: none).
    """
    first: graphs.Graphs | None = None
    for cell in cells:
        size = cell.images
        try:
            _try_on_device(cell)
            account = cell.account()
            entry = {
                "arm": cell.arm.name,
                "parameters": account.parameters,
                "flops_per_image": account.flops // size,
                **{k: v for k, v in asdict(account).items() if k not in ("parameters", "flops")},
                "kept_bytes_per_block": account.kept_bytes_per_block,
                **needs(cell, size, budget),
                "batch_size": size,
            }
            if compiled:
                traced = graphs.trace(cell.config, cell.ops, size, cell.dtype)
                entry["kept_bytes_compiled"] = traced.kept_bytes
                entry["graphs"] = graphs.sentence(graphs.difference(first or traced, traced))
                first = first or traced
        except InputError as error:
            raise InputError(f"arm '{cell.arm.name}': {error}") from error
        if budget is not None:
            entry["fits"] = entry["needed_bytes"] <= budget
            entry["largest_batch"] = largest(partial(_needed, cell, budget), budget, size)
        yield entry


def needs(cell: Prepared, batch: int, budget: int | None = None) -> dict[str, int]:
    """Bytes that training an arm takes of the device's memory, part by part, and `needed_bytes`, all of them.

    data: the images, where they are kept on the device (Data.to). copies: of the state, beside the step's own: the
    epoch's first, and of a captured step the one handed back. best: the best weights. evaluation: a forward pass of
    its batch, beside the state; a captured step's memory stays taken meanwhile, else the larger of the two counts.
    workspace, reserve: on a GPU (see above).
    """
    step, forward = cell.account(batch), cell.account(min(BATCH, len(cell.data.val.labels)), "eval")
    cuda, graphed = cell.recipe.device == "cuda", cell.recipe.engine == "graphed"
    data = sum(split.images.nbytes for split in (cell.data.train, cell.data.val))
    parts = {
        "data_bytes": data if not cuda or budget is None or data <= budget / 2 else 0,
        "copies_bytes": step.state_bytes * (2 if graphed else 1),
        "best_bytes": forward.state_bytes,
        "evaluation_bytes": forward.peak_bytes - forward.state_bytes,
        "workspace_bytes": WORKSPACE if cuda else 0,
    }
    evaluated = (step.peak_bytes if graphed else step.state_bytes) + parts["evaluation_bytes"]
    whole = sum(parts.values()) - parts["evaluation_bytes"] + max(step.peak_bytes, evaluated)
    parts["reserve_bytes"] = CONTEXT + int(FRAGMENTED * whole) if cuda else 0
    return parts | {"needed_bytes": whole + parts["reserve_bytes"]}


def _needed(cell: Prepared, budget: int, batch: int) -> int:
    return needs(cell, batch, budget)["needed_bytes"]


def _try_on_device(cell: Prepared) -> None:
    """InputError where the arm's kernels would refuse a GPU's tensors; it need not be here."""
    if cell.recipe.device != "cuda":
        return
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        params = {name: torch.empty(shape) for name, shape in model.shapes(cell.config, cell.ops).items()}
        images = torch.empty(2, *cell.data.train.images.shape[1:], dtype=torch.uint8)
        batch = images, torch.empty(2, dtype=torch.int64)
        try:
            loss = objective(cell.config, cell.ops, cell.prepare, cell.dtype, targets=cell.targets)
            loss(params, batch, torch.empty(2, dtype=torch.int64))
        except (RuntimeError, AssertionError):
            if torch.cuda.is_available():
                raise  # else a kernel asked which GPU this is, and there is none to ask


def largest(peak: Callable[[int], int], budget: int, start: int) -> int:
    """The largest batch, up to a million, whose peak, which grows with the batch, is within the budget; 0 if none."""
    fits, too_large = 0, None
    sizes: dict[int, int] = {}
    guess = start
    while (too_large is None or too_large - fits > 1) and fits < _LARGEST:
        sizes[guess] = peak(guess)
        if sizes[guess] <= budget:
            fits = guess
        else:
            too_large = guess
        (low, at_low), (high, at_high) = sorted(sizes.items())[0], sorted(sizes.items())[-1]
        slope = (at_high - at_low) / (high - low) if high > low else sizes[guess] / guess
        guess = int(high + (budget - at_high) / slope) if slope > 0 else 2 * fits
        guess = min(_LARGEST, max(fits + 1, guess if too_large is None else min(guess, too_large - 1)))
    return fits
