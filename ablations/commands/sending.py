"""A study whose cells are trained elsewhere: this process only sends them, and writes the report."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ablations.commands.conducting import Cells, conclude, decide_by, lay_out, retry, train_until
from ablations.commands.options import Command
from ablations.study import launchers, orders, passes, running, store
from ablations.study.progress import Terminal
from ablations.study.signals import Stopped


def launch(command: Command, console: Console) -> int:
    """The same with every cell trained elsewhere; this process only sends them, and writes the report."""
    study = running.foresee(command.arms, command.recipe, command.data_root, present=False)
    out, seeds, planned, folders = lay_out(command, study)
    running.refuse_other_settings(study, command.preset, out, command.deterministic)
    retry(command, out, folders)
    terminal = Terminal(console, folders, bar=False)
    where = Path.cwd()
    order = orders.Order(
        arms=command.arms,
        recipe=command.recipe,
        root=command.data_root,
        preset=command.preset,
        out=out,
        deterministic=command.deterministic,
        accept_changes=command.accept_changes,
        threads=command.cpus,
        here=where,
    )
    try:
        with launchers.launched(command.launcher, order, command.ray_address, command.slurm) as send:
            failed = _send(command, study, planned, seeds, order, terminal, send)
    except Stopped:
        conclude(out, console, ended=True, wait=False)
        raise
    conclude(out, console, ended=failed > 0)
    return failed


def _send(
    command: Command,
    study: running.Study,
    planned: Cells,
    seeds: Sequence[int],
    order: orders.Order,
    progress: Terminal,
    send: orders.Send,
) -> int:
    """The cells, then what needs a machine alone; returns how many failed."""

    def train(cells: Cells) -> int:
        return orders.run([(cell.arm.name, seed) for cell, seed in cells], order, send, progress)

    out = order.out
    if not (out / "study.json").is_file():
        orders.one(send, order, "open")
    if command.margin or command.until:
        decide_by(command, out)
    progress.note(f"{out}: {len(planned)} cells, by {command.launcher}")
    if study.data.note:
        progress.note(study.data.note)
    failed = train_until(command, study, seeds, out, progress, train) if command.until and planned else train(planned)
    if command.profile or passes.timing_due(study.cells, out, command.timing_only):
        orders.one(send, order, "measure", command.timing_only, command.profile)
    if command.profile:
        failed += sum((store.profile_folder(out, cell.arm.name) / "failed.json").is_file() for cell in study.cells)
    return failed
