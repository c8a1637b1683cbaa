"""Plans on the terminal: what arms cost, and how long a study takes."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from ablations.study.hours import Planned, summary
from ablations.study.plan import Entry

_PARTS = ("data", "copies", "best", "evaluation", "workspace", "reserve")


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
        gflop = e["flops_per_image"] / 1e9
        row = [f"{e['parameters'] / 1e6:.2f}M", f"{gflop:.2f}" if gflop >= 1 else f"{gflop:.3g}"]
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


def show_hours(
    console: Console, left: Sequence[Planned], seconds: Mapping[str, float], source: str, processes: int
) -> None:
    """Tables by arm and by number of devices."""
    whole = summary(left, processes)
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for title in ("arm", "ms a step", "cells", "hours a cell", "device-hours"):
        table.add_column(title, justify="left" if title == "arm" else "right")
    for name, step in seconds.items():
        hours = [cell.hours for cell in left if cell.arm == name]
        each = f"{hours[0]:,.2f}" if hours else "—"
        table.add_row(name, f"{1000 * step:,.1f}", str(len(hours)), each, f"{sum(hours) * processes:,.2f}")
    console.print(table)
    times = ", ".join(f"{devices:,} in {hours:,.2f} h" for devices, hours in whole["wall_hours"].items())
    console.print(
        f"{whole['cells']:,} cells, {whole['device_hours']:,.2f} device-hours. Devices, and when all cells are done: "
        f"{times}. Step times: {source}. An evaluation after every epoch counts a third of a step's time an image; "
        "compiling and reading data are not counted.",
        highlight=False,
        soft_wrap=True,
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}" if abs(size) < 100 * 2**20 else f"{size / 2**20:,.0f}"
