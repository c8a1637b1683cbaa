"""What is told without training: what there is, what arms cost, how long cells take."""

import json
from typing import IO

from rich.console import Console

from ablations.commands.options import Command, folder, margins
from ablations.reporting import plans
from ablations.study import arms as arm_names
from ablations.study import hours, machine, outcomes, plan, running, store
from ablations.study.presets import ABOUT
from ablations.study.recipes import PRECISIONS
from core.data import sets
from core.engine import ENGINES
from core.sizes import read_bytes
from core.transforms.registry import REGISTRY


def describe(console: Console) -> None:
    """What can be asked for."""
    lines = ["arms (--arms all):", *(f"  {name}" for name in arm_names.lattice()), "", "optimizations:"]
    lines += [f"  {name:<10} {t.about} ({t.contract})" for name, t in REGISTRY.items()]
    lines += ["", "presets:", *(f"  {name:<10} {text}" for name, text in ABOUT.items())]
    lines += [
        "",
        f"data:       {', '.join([*sets.NAMES, *(f'plugin:{name}' for name in sets.PLUGGED)])}",
        f"engines:    {', '.join(ENGINES)}",
    ]
    lines += [f"devices:    {', '.join(machine.DEVICES)}", f"precisions: auto, {', '.join(PRECISIONS)}"]
    console.print("\n".join(lines))


def foresee(command: Command, console: Console, told: IO[str]) -> None:
    """Print the account of every arm; as JSON there."""
    budget = None if command.budget is None else read_bytes(command.budget)
    study = running.foresee(command.arms, command.recipe, command.data_root, present=False)
    planned = []
    for entry in plan.entries(study.cells, command.recipe.engine == "compiled", budget):
        planned.append(entry)
        if not command.json and console.is_terminal:
            console.print(f"{len(planned)} of {len(study.cells)}: {entry['arm']}", end="\r")
    if command.json:
        print(json.dumps(planned, indent=2), file=told)
    else:
        recipe = study.recipe
        share = f"{study.cells[0].images} of " if recipe.parallel else ""
        of = f" in one of {recipe.processes} processes ({recipe.parallel})" if recipe.parallel else ""
        where = f"{of} on {recipe.device}, {recipe.precision}, engine {recipe.engine}"
        plans.show(console, planned, f"{share}{recipe.batch_size} images {recipe.terms}{where}", budget)


def foresee_hours(command: Command, console: Console, told: IO[str]) -> None:
    """Print how long the cells take that are left; as JSON there."""
    from ablations.analysis import factors  # statistics, which no refusal should wait for
    from ablations.reporting import words

    study = running.foresee(command.arms, command.recipe, command.data_root, present=command.recipe.parallel is None)
    out, each = folder(command, study.data.name), study.recipe.processes or 1
    running.refuse_other_settings(study, command.preset, out, command.deterministic)
    seconds, source = hours.step_seconds(study, out)
    planned = study.planned(range(command.first_seed, command.first_seed + command.seeds), command.every_arm)
    ended = outcomes.finished if command.retry_failed else running.settled
    done = {(cell, seed): ended(store.cell_folder(out, cell.arm.name, seed)) for cell, seed in planned}
    cells = hours.cells([cell for cell in planned if not done[cell]], seconds)
    if command.json:
        summary = {"step_seconds": seconds, "source": source, **hours.summary(cells, each)}
        print(json.dumps(summary, indent=2), file=told)
        return
    plans.show_hours(console, cells, seconds, source, each)
    margin = margins(command)["margin"].get("accuracy", 0.5)
    names = {name for arm in seconds for name in factors.levels(arm)}
    console.print(words.seeds(out, margin, len(names)), highlight=False, soft_wrap=True)
