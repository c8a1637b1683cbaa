"""What every arm will cost, accounted for on fake tensors before anything runs: run.py --plan."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
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


def show(console: Console, planned: Sequence[Entry], recipe: str, budget: int | None) -> None:
    """A table with a row an arm, and what its kept bytes are due to. recipe: in words what is planned."""
    titles = ["GFLOP", "MiB/block", "kept", "state", "other", "peak"]
    titles += ["compiled"] if "kept_bytes_compiled" in planned[0] else []
    titles += ["needs", *(["fits", "batch ≤"] if budget is not None else [])]
    if not console.is_terminal:
        console.width = max(console.width, 120)
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("arm", overflow="fold")
    for title in ["params", *titles]:
        table.add_column(title, justify="right", no_wrap=True)
    for e in planned:
        other = e["peak_bytes"] - e["state_bytes"] - e["kept_bytes"]
        sizes = [e["kept_bytes_per_block"], e["kept_bytes"], e["state_bytes"], other, e["peak_bytes"]]
        sizes += [e["kept_bytes_compiled"]] if "kept_bytes_compiled" in e else []
        row = [f"{e['parameters'] / 1e6:.2f}M", f"{e['flops_per_image'] / 1e9:.2f}"]
        row += map(_mib, [*sizes, e["needed_bytes"]])
        row += [("no", "yes")[e["fits"]], f"{e['largest_batch']:,}"] if budget is not None else []
        table.add_row(e["arm"], *row)
    console.print(table)
    first = planned[0]
    parts = ", ".join(f"{name} {_mib(first[f'{name}_bytes'])}" for name in _PARTS if first[f"{name}_bytes"])
    console.print(
        f"A training step of {recipe}, predicted for eager PyTorch. GFLOP: an image, forward and backward. MiB: kept "
        "for the backward pass (a block; in all), state (weights and the optimizer's), other (peak - kept - state: "
        f"gradients and transients), peak; needs: of the device, a study's other memory included (of {first['arm']}: "
        f"{parts}). What is kept:",
        highlight=False,
    )
    for e in planned:
        made = [f"{100 * size / e['kept_bytes']:.0f} % {name}" for name, size in e["kept_by_op"].items()]
        console.print(f"  {e['arm']}: {', '.join(made[:4])}", highlight=False, markup=False)
    if "graphs" in first:
        console.print(f"What becomes of the compiled graphs of {first['arm']}:", highlight=False, markup=False)
        for e in planned[1:]:
            console.print(f"  {e['arm']}: {e['graphs']}", highlight=False, markup=False)


_PARTS = ("data", "copies", "best", "evaluation", "workspace", "reserve")


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}" if abs(size) < 100 * 2**20 else f"{size / 2**20:,.0f}"
