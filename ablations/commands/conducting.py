"""A study of these options, from its first cell to its report."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ablations.commands.options import Command, folder, margins
from ablations.study import jobs, machine, outcomes, passes, processes, reading, running, store, timing
from ablations.study.progress import Terminal
from ablations.study.signals import Stop, Stopped
from core import files
from core.errors import InputError
from core.foreign.model import Foreign

Cells = Sequence[tuple[running.Prepared, int]]


def execute(command: Command, console: Console, stop: Stop) -> int:
    """Run or continue the study of a command; returns the number of failed cells. Stopped, with its report written, if
    told to."""
    if command.deterministic:
        machine.deterministic()
    if command.jobs > 1 and not command.worker:
        jobs.divide_threads(command.jobs, machine.named(command.recipe.device))
    versions = machine.environment(machine.named(command.recipe.device))
    same: dict[str, Any] = {name: versions[name] for name in ("torch", "revision")}
    same |= {"arms": command.arms, "deterministic": command.deterministic}
    processes.agree(same | asdict(command.recipe))
    study = processes.in_turn(lambda: running.prepare(command.arms, command.recipe, command.data_root))
    if not processes.leads():
        running.follow(study)
        return 0
    with processes.leading():
        return _lead(command, study, console, stop)


def _lead(command: Command, study: running.Study, console: Console, stop: Stop) -> int:
    out, seeds, planned, folders = lay_out(command, study)
    study = running.record(study, command.preset, out, command.deterministic, command.accept_changes)
    retry(command, out, folders)
    left = _left(planned, folders, out)
    if not command.worker:
        _introduce(console, study, out, len(folders), len(left), len(seeds) * len(study.cells) - len(planned))
        for name, why in study.refused.items():
            console.print(f"left out: {name} ({why})", soft_wrap=True)
        for why in filter(None, map(outcomes.damage, (f for f in folders if (f / "result.json").exists()))):
            console.print(f"trained again: {why}", soft_wrap=True)
        if many := sum(map(outcomes.failed, folders)):
            console.print(f"{many} cells failed before; --retry-failed trains them again")
    try:
        failed = _run(command, study, planned, seeds, out, Terminal(console, folders, command.jobs == 1), stop)
    except Stopped:
        if not command.worker:
            conclude(out, console, ended=True, wait=False)
        raise
    if not command.worker:
        conclude(out, console, ended=failed > 0)
    return failed


def _run(
    command: Command,
    study: running.Study,
    planned: Cells,
    seeds: Sequence[int],
    out: Path,
    terminal: Terminal,
    stop: Stop,
) -> int:
    """The cells, then what needs the machine alone; returns how many failed."""
    with terminal as progress:
        if command.margin or command.until:
            decide_by(command, out)
        spawning = command.jobs > 1 and not command.worker and bool(planned)
        for cell in study.cells if spawning else ():
            timing.ceiling(out, cell)  # measured before others compute beside
        with (
            jobs.workers(command.jobs - 1, progress.note, "--data", command.recipe.data) if spawning else nullcontext()
        ):
            train = partial(running.run, made_by=study.made_by, out=out, progress=progress, stop=stop)
            seedwise = bool(command.until and planned)
            failed = train_until(command, study, seeds, out, progress, train) if seedwise else train(planned)
        if command.worker:
            return failed
        failed += passes.measured(study.cells, study.made_by, out, progress, command.timing_only, command.profile)
    return failed


def lay_out(command: Command, study: running.Study) -> tuple[Path, range, Cells, list[Path]]:
    """A study's folder, its seeds, its cells, and a folder for each of these."""
    out = folder(command, study.data.name)
    seeds = range(command.first_seed, command.first_seed + command.seeds)
    planned = [] if command.timing_only else study.planned(seeds, command.every_arm)
    folders = [store.cell_folder(out, cell.arm.name, seed) for cell, seed in planned]
    store.refuse_shared(folders)
    return out, seeds, planned, folders


def retry(command: Command, out: Path, folders: Sequence[Path]) -> None:
    """With --retry-failed, forget what failed; other processes may do so at the same time."""
    if command.retry_failed:
        timing.forget_failures(out)
        for path in filter(outcomes.failed, folders):
            (path / "failed.json").unlink(missing_ok=True)


def _left(planned: Cells, folders: Sequence[Path], out: Path) -> Cells:
    """The cells without result or failure; InputError if the disk has no room for them."""
    left = [cell for cell, at in zip(planned, folders, strict=True) if not running.settled(at)]
    need, free = running.need(left), files.room(out)
    if free < need:
        need_, free_ = (f"{size / 2**20:,.0f} MiB" for size in (need, free))
        raise InputError(f"the cells that are left need {need_} of disk, and '{out}' has {free_} free; free some")
    return left


def _introduce(console: Console, study: running.Study, out: Path, cells: int, left: int, spared: int) -> None:
    """What will run, where and how."""
    recipe, data = study.recipe, study.data
    known = f" ({spared} more are known from their twins; --every-arm trains them too)" if cells and spared else ""
    console.print(
        f"{out}: {cells - left} of {cells} cells finished before, {left} to run{known}; device "
        f"{recipe.device}, engine {recipe.engine} ({study.why}), {recipe.precision}, {torch.get_num_threads()} "
        f"threads, data {data.name} ({len(data.train.labels):,} + {len(data.val.labels):,} images)",
        soft_wrap=True,
    )
    if data.note:
        console.print(data.note, soft_wrap=True)
    if isinstance(first := study.cells[0].config, Foreign):
        console.print(first.sentence, highlight=False, markup=False, soft_wrap=True)


def conclude(out: Path, console: Console, ended: bool, wait: bool = True) -> None:
    """Write the report of what is there, one process at a time. ended: the run has failed or was stopped, which its
    exit status is to tell: an error is told here, not raised."""
    if any(out.glob("cells/*/seed*/result.json")):
        from ablations.reporting import compose, terminal  # figures and statistics: not for --list or a refusal

        try:
            with compose.alone(out / "report", wait) as mine:
                if mine:
                    terminal.conclude(out, console)
        except Exception as error:
            if not ended:
                raise
            console.print(f"no report: {type(error).__name__}: {error}", highlight=False, markup=False, soft_wrap=True)


def decide_by(command: Command, out: Path) -> None:
    """Keep the margins, and how often a run looks before it stops, for the report."""
    from ablations.analysis import verdicts

    with store.changing(out):
        before, looks = verdicts.read_decisions(out)
        looks = max(looks, command.seeds - 1) if command.until else looks
        store.write_json(out / "margins.json", {"margins": before | margins(command)["margin"], "looks": looks})


def train_until(
    command: Command,
    study: running.Study,
    seeds: Sequence[int],
    out: Path,
    progress: Terminal,
    train: Callable[[Cells], int],
) -> int:
    """Train until all is decided; returns how many cells failed."""
    from ablations.analysis import comparisons, verdicts

    asked = margins(command)["until"]

    def decided(count: int) -> bool:
        """Not before all seeds are met that an earlier run began, and not where nothing finished."""
        if any(any(out.glob(f"cells/*/seed{seed}")) for seed in seeds[count:]) or not reading.results(out):
            return False
        return verdicts.decided(comparisons.compare([out]), asked)

    count, failed, why = running.until(
        decided,
        seeds,
        60.0 if command.max_minutes is None else command.max_minutes,
        lambda seed: train([(c, s) for c, s in study.planned(seeds, command.every_arm) if s == seed]),
    )
    progress.note(f"--until {' '.join(command.until)}: {count} of at most {len(seeds)} seeds; {why}")
    return failed
