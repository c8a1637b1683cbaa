"""What every arm will cost, accounted for on fake tensors before anything runs: run.py --plan."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ablations.study.arms import Arm
from ablations.study.recipes import Recipe
from core.account import graphs
from core.account.step import Account, account
from core.data.splits import Data
from core.errors import InputError
from core.step import AdamW
from core.vit import VitConfig

Entry = dict[str, Any]

_LARGEST = 2**20
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def read_bytes(text: str) -> int:
    """ "24GiB" -> 25769803776; InputError for what is no size above 0."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([kmgt]i?)?b?", text.strip().lower())
    size = float(match[1]) * _UNITS[match[2] or ""] if match else 0
    if not 1 <= size < 2**63:
        raise InputError(f"budget '{text}' is no size; write a number and a unit, such as 24GiB or 900MB")
    return int(size)


def entries(
    arms: Sequence[Arm], recipe: Recipe, data: Data, compiled: bool = False, budget: int | None = None
) -> Iterator[Entry]:
    """The account of every arm in turn; InputError, with the arm's name, for one that cannot be built.

    compiled: also `kept_bytes_compiled`, what torch.compile's partitioner keeps. With a budget in bytes also whether
    the recipe's batch fits, and the largest batch whose predicted peak does (0: none).
    """
    for arm in arms:
        config = recipe.model(arm, data)
        try:
            cost = accounted(arm, config, recipe)
            entry = {
                "arm": arm.name,
                "parameters": cost.parameters,
                "flops_per_image": cost.flops // recipe.batch_size,
                **{k: v for k, v in asdict(cost).items() if k not in ("parameters", "flops")},
                "kept_bytes_per_block": cost.kept_bytes_per_block,
                "batch_size": recipe.batch_size,
            }
            if compiled:
                traced = graphs.trace(config, arm.ops, recipe.batch_size, recipe.dtype(arm))
                entry["kept_bytes_compiled"] = traced.kept_bytes
        except InputError as error:
            raise InputError(f"arm '{arm.name}': {error}") from error
        if budget is not None:
            entry["fits"] = cost.peak_bytes <= budget
            entry["largest_batch"] = largest(partial(_peak, arm, config, recipe), budget, recipe.batch_size)
        yield entry


def accounted(arm: Arm, config: VitConfig, recipe: Recipe) -> Account:
    """The account of an arm's training step under a recipe."""
    optimizer = AdamW(clip=recipe.clip)
    return account(config, arm.ops, recipe.batch_size, recipe.dtype(arm), optimizer=optimizer, image=recipe.image)


def bytes_per_image(arm: Arm, config: VitConfig, recipe: Recipe) -> int:
    """By how much one more image in the batch raises an arm's predicted peak."""
    size = recipe.batch_size
    return (_peak(arm, config, recipe, 2 * size) - _peak(arm, config, recipe, size)) // size


def _peak(arm: Arm, config: VitConfig, recipe: Recipe, batch: int) -> int:
    return accounted(arm, config, replace(recipe, batch_size=batch)).peak_bytes


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


def show(console: Console, planned: Sequence[Entry], budget: int | None) -> None:
    """A table with a row an arm, and what its kept bytes are due to."""
    batch = planned[0]["batch_size"]
    titles = ["GFLOP", "MiB/block", "kept", "state", "other", "peak"]
    titles += ["compiled"] if "kept_bytes_compiled" in planned[0] else []
    titles += ["fits", "batch ≤"] if budget is not None else []
    if not console.is_terminal:
        console.width = max(console.width, 110)
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("arm", overflow="fold")
    for title in ["params", *titles]:
        table.add_column(title, justify="right", no_wrap=True)
    for e in planned:
        other = e["peak_bytes"] - e["state_bytes"] - e["kept_bytes"]
        sizes = [e["kept_bytes_per_block"], e["kept_bytes"], e["state_bytes"], other, e["peak_bytes"]]
        sizes += [e["kept_bytes_compiled"]] if "kept_bytes_compiled" in e else []
        row = [f"{e['parameters'] / 1e6:.2f}M", f"{e['flops_per_image'] / 1e9:.2f}", *map(_mib, sizes)]
        row += [("no", "yes")[e["fits"]], f"{e['largest_batch']:,}"] if budget is not None else []
        table.add_row(e["arm"], *row)
    console.print(table)
    console.print(
        f"A training step of {batch} images, predicted for eager PyTorch. GFLOP: an image, forward and backward. MiB: "
        "kept for the backward pass (a block; in all), state (weights and AdamW's moments), other (peak - kept - "
        "state: gradients and transients), peak. What is kept:",
        highlight=False,
    )
    for e in planned:
        parts = [f"{100 * size / e['kept_bytes']:.0f} % {made}" for made, size in e["kept_by_op"].items()]
        console.print(f"  {e['arm']}: {', '.join(parts[:4])}", highlight=False, markup=False)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}" if abs(size) < 100 * 2**20 else f"{size / 2**20:,.0f}"
