"""A plan on the terminal."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

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


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}" if abs(size) < 100 * 2**20 else f"{size / 2**20:,.0f}"
