"""The command: trains every arm on the same data and compares them.

python ablations/run.py --arms all
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Annotated

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch loads: the memory pass would print a banner
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the study listens: no traceback out of an import

import torch
import tyro
from rich.console import Console

from ablations.study import arms as arm_names
from ablations.study import (
    claims,
    hours,
    jobs,
    launchers,
    machine,
    orders,
    plan,
    processes,
    reading,
    running,
    store,
    timing,
)
from ablations.study.presets import ABOUT, ARMS, PRESETS, SEEDS
from ablations.study.progress import Terminal
from ablations.study.recipes import OURS, PRECISIONS, Recipe
from ablations.study.signals import Stop, Stopped, minutes_left
from ablations.study.speaking import one_message
from core import plugins
from core.data import sets
from core.engine import ENGINES
from core.errors import InputError, choose
from core.foreign.model import Foreign
from core.sizes import read_bytes
from core.transforms.registry import REGISTRY

SEEDS_MOST = 10_000
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True)
class Command:
    """Which training optimizations pay for a Vision Transformer, alone and together?

    Trains the model under every arm, all else equal, and compares accuracy, speed and memory. The same command
    again continues where it stopped.
    """

    arms: str = "all"
    """all (with the controls), more (the other optimizations, each alone and with flash), published, finetune,
    controls, or names joined by commas; an arm is baseline or optimizations joined by + (see --list). Last may come
    lattice:A,B,C: every combination of these."""
    design: str = "full"
    """full, or half: of a lattice: of four factors or more the arms with an even number of them, which tell all main
    effects. The report names the interactions that they do not tell."""
    preset: str = ""
    """One of those --list prints; without one: matched on a GPU, else quick. Its values are the defaults below."""
    seeds: int = 1
    """Seeds an arm. An arm that differs from another one by exact optimizations alone, and so in nothing that it
    learns, is trained at the first seed only."""
    every_arm: Flag = False
    """Train every arm at every seed."""
    until: tuple[str, ...] = ()
    """accuracy=0.5: go on seed by seed, up to --seeds, until every optimization has a verdict at this margin."""
    max_minutes: float | None = None
    """Stop at a checkpoint after so many minutes, with exit status 75 if cells are left; the same command continues.
    With --until, no seed is started that would end later than this, or than 60 minutes unless given."""
    jobs: int = 1
    """Processes on this machine that share the cells and its threads, one GPU each where there are several. Two of
    this command on one folder share its cells, too, on any machines that see it."""
    launcher: str = "here"
    """Where cells are trained: here, ray (each a task of a Ray cluster) or slurm (each a job of an array). All may
    work on one folder at once, which all their machines must see."""
    cpus: int = 1
    """With --launcher: processor threads of a cell; with --device cuda it has a GPU, too."""
    ray_address: str = ""
    """HOST:PORT of a Ray cluster that this machine belongs to; without it the one that runs here, or a new one."""
    slurm: tuple[str, ...] = ()
    """partition=NAME time=MINUTES array_parallelism=8 mem=32GB …: of the jobs. One whose time is over is queued again
    and goes on."""
    retry_failed: Flag = False
    """Train failed cells again."""
    deterministic: Flag = False
    """Use deterministic algorithms alone; a cell that needs an operation without one fails, and names it."""
    worker: Flag = False
    """Set by --jobs: train cells beside the process that started this one."""
    margin: tuple[str, ...] = ()
    """What still counts as no worse, by response: accuracy=0.5 (points) time=2 memory=2 (%)."""
    timing_only: Flag = False
    """Train nothing: measure the step times of the arms again, side by side (what a run does after training)."""
    first_seed: int = 0
    """The first of them; the others follow. Studies of different seeds can be joined (report.py A B)."""
    data_root: Path = Path("data")
    """Where downloads and the cache of decoded images are kept."""
    out: Path | None = None
    """The study's folder; runs/PRESET-DATA unless given."""
    accept_changes: Flag = False
    """Go on with a study whose cells were made by other code, data or weights: the report tells which."""
    list: Flag = False
    """Print arms, presets, data sets and engines, and stop."""
    plan: Flag = False
    """Print what every arm would compute and keep in memory, and stop: nothing is trained; no data is fetched, but a
    folder is read. With --engine compiled also what the compiler keeps (slower)."""
    hours: Flag = False
    """With --plan: instead, how long the study takes on how many devices, and how many seeds a verdict needs (--margin
    accuracy=0.5). Step times are those of the study's timing pass, else a few steps of each arm are measured."""
    json: Flag = False
    """With --plan: as JSON."""
    budget: str | None = None
    """With --plan: memory such as 24GiB. Marks the arms whose needs are within it, and the largest batch that is."""
    profile: Flag = False
    """Also profile a few steps of every arm, after training: costliest operations, time by category, memory over a
    step, the difference from the baseline, a trace."""
    recipe: Annotated[Recipe, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = field(default_factory=Recipe)


def read(arguments: list[str], console: Console) -> Command:
    """The command line, defaults taken from its preset. `--set` adds to the preset's own settings."""
    preset = _last("--preset", arguments)
    if preset is None:
        device = _last("--device", arguments)
        gpu = device == "cuda" or (device != "cpu" and torch.cuda.is_available())
        preset, why = ("matched", "for a GPU") if gpu else ("quick", "no accelerator in use")
        about = "" if "--plan" in arguments else f": {ABOUT[preset]}"
        if "--worker" not in arguments:
            console.print(f"preset {preset} ({why}){about}; --preset chooses another")
    base = PRESETS[choose("preset", preset, PRESETS)]
    default = Command(arms=ARMS.get(preset, "all"), preset=preset, seeds=SEEDS.get(preset, 1), recipe=base)
    command = tyro.cli(Command, args=arguments, default=default)
    command = replace(command, recipe=of_its_model(command.recipe, base))
    if command.recipe.set != base.set:
        command = replace(command, recipe=replace(command.recipe, set=base.set + command.recipe.set))
    if not 1 <= command.seeds <= SEEDS_MOST:
        raise InputError(f"seeds {command.seeds} is outside 1 to {SEEDS_MOST:,}")
    choose("design", command.design, ("full", "half"))
    if command.design == "half":
        if "lattice:" not in command.arms:
            raise InputError("--design half is half of a lattice, and --arms has none: write --arms lattice:A,B,C,D")
        command = replace(command, arms=command.arms.replace("lattice:", "half:"))
    if not 0 <= command.first_seed < 2**63 - SEEDS_MOST:
        raise InputError(f"first seed {command.first_seed} is outside 0 to 2^63 - {SEEDS_MOST + 1:,}")
    if command.until and command.seeds < 2:
        raise InputError("--until with one seed decides nothing: pass --seeds with the most there may be, such as 8")
    if command.jobs < 1:
        raise InputError(f"jobs {command.jobs} is too small: at least 1")
    _check_launcher(command)
    if command.max_minutes is not None and not command.max_minutes > 0:
        raise InputError(f"max minutes {command.max_minutes:g} must be above 0")
    if command.margin or command.until:
        margins(command)
    if (command.json or command.budget is not None) and not command.plan:
        raise InputError(f"{'--json' if command.json else '--budget'} belongs to --plan; add --plan")
    if command.hours and (not command.plan or command.budget is not None):
        raise InputError("--hours belongs to --plan, without --budget; write --plan --hours")
    if command.recipe.parallel and (command.profile or command.jobs > 1):
        option = "--profile" if command.profile else "--jobs"
        raise InputError(f"{option} is for cells of one process each; leave out --parallel, or {option}")
    if command.plan and (command.profile or command.timing_only):
        option = "--profile" if command.profile else "--timing-only"
        raise InputError(f"{option} belongs to a run, and --plan runs nothing; leave out one")
    return command


def of_its_model(recipe: Recipe, preset: Recipe) -> Recipe:
    """The recipe without what its preset says of our own model, if that of others is asked for; InputError for what the
    command line says of ours beside it."""
    if recipe.model is None:
        return recipe
    if given := [name for name in OURS if getattr(recipe, name) != getattr(preset, name)]:
        option = f"--{given[0].replace('_', '-')}"
        raise InputError(f"{option} is for our own model, and --model {recipe.model} is another; leave out one")
    return replace(recipe, weights=None, baseline_width=None, baseline_heads=None, eps=None)


def _check_launcher(command: Command) -> None:
    """InputError for a launcher that is unknown, and for options of another one."""
    choose("launcher", command.launcher, launchers.LAUNCHERS)
    if command.cpus < 1:
        raise InputError(f"cpus {command.cpus} is too small: at least 1")
    for option, given, belongs in (
        ("--jobs", command.jobs > 1, ("here",)),
        ("--cpus", command.cpus > 1, ("ray", "slurm")),
        ("--ray-address", bool(command.ray_address), ("ray",)),
        ("--slurm", bool(command.slurm), ("slurm",)),
    ):
        if given and command.launcher not in belongs:
            raise InputError(f"{option} belongs to --launcher {' or '.join(belongs)}; this is {command.launcher}")


def margins(command: Command) -> dict[str, dict[str, float]]:
    """What --margin and --until ask for, by response; InputError for unknown responses and for what is no number."""
    from ablations.analysis import verdicts  # statistics, which no other refusal should wait for

    found: dict[str, dict[str, float]] = {}
    for option in ("margin", "until"):
        pairs = dict(text.partition("=")[::2] for text in getattr(command, option))
        whole = verdicts.read_margins(pairs)
        found[option] = {name: whole[name] for name in pairs}
    if set(found["until"]) - {"accuracy"}:
        raise InputError("--until is of accuracy: seeds tell nothing of time or memory; write --until accuracy=0.5")
    return found


def each(command: Command) -> list[Command]:
    """A command for each of its data sets; of several, InputError for one that is unknown, before any is trained."""
    names = command.recipe.data.split(",")
    if not all(names):
        raise InputError(f"--data '{command.recipe.data}' has an empty name; write them as A,B")
    if len(names) > 1 and (command.out or command.plan):
        option = "--out" if command.out else "--plan"
        raise InputError(f"{option} is for one data set, and --data has {len(names)}; leave it out, or pass one")
    folders = [_file_name(name) for name in names]
    if len(set(folders)) < len(names):
        raise InputError(f"--data {','.join(names)} gives two studies one folder; run them one by one, with --out")
    if len(names) > 1:
        for name in names:
            sets.outline(name, command.data_root, command.recipe.image)
    return [replace(command, recipe=replace(command.recipe, data=name)) for name in names]


def _all(option: str, arguments: list[str]) -> list[str]:
    """The values of an option that takes several, `--option A B`."""
    if option not in arguments:
        return []
    rest = arguments[arguments.index(option) + 1 :]
    return list(takewhile(lambda word: not word.startswith("--"), rest))


def _last(option: str, arguments: list[str]) -> str | None:
    """The last value of an option on a command line, `--option value` or `--option=value`."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    given = [
        value if word == option else word.removeprefix(f"{option}=")
        for word, value in pairs
        if word == option or word.startswith(f"{option}=")
    ]
    return given[-1] if given else None


def execute(command: Command, console: Console, stop: Stop) -> int:
    """Run or continue the study of a command; returns the number of failed cells. Stopped, with its report written, if
    told to."""
    if command.launcher != "here":
        return _launch(command, console)
    if command.deterministic:
        machine.deterministic()
    if command.jobs > 1 and not command.worker:
        jobs.divide_threads(command.jobs, machine.named(command.recipe.device))
    versions = machine.environment(machine.named(command.recipe.device))
    same = {name: versions[name] for name in ("torch", "revision")}
    processes.agree({"arms": command.arms, **asdict(command.recipe), **same})
    study = processes.in_turn(lambda: running.prepare(command.arms, command.recipe, command.data_root))
    if not processes.leads():
        running.follow(study)
        return 0
    with processes.leading():
        return _lead(command, study, console, stop)


def _lead(command: Command, study: running.Study, console: Console, stop: Stop) -> int:
    out = _folder(command, study.data.name)
    running.record(study, command.preset, out, command.deterministic, command.accept_changes)
    seeds = range(command.first_seed, command.first_seed + command.seeds)
    planned = [] if command.timing_only else study.planned(seeds, command.every_arm)
    folders = [store.cell_folder(out, cell.arm.name, seed) for cell, seed in planned]
    _retry(command, folders)
    left = _left(command, study, planned, out)
    if not command.worker:
        _introduce(console, study, out, len(folders), len(left), len(seeds) * len(study.cells) - len(planned))
        for name, why in study.refused.items():
            console.print(f"left out: {name} ({why})", soft_wrap=True)
        for why in filter(None, map(reading.damage, (f for f in folders if (f / "result.json").exists()))):
            console.print(f"trained again: {why}", soft_wrap=True)
        if many := sum(map(reading.failed, folders)):
            console.print(f"{many} cells failed before; --retry-failed trains them again")
    try:
        failed = _run(command, study, planned, seeds, out, Terminal(console, len(left), command.jobs == 1), stop)
    except Stopped:
        if not command.worker:
            _conclude(out, console, wait=False)
        raise
    if not command.worker:
        _conclude(out, console)
    return failed


def _launch(command: Command, console: Console) -> int:
    """The same with every cell trained elsewhere; this process only sends them, and writes the report."""
    study = running.foresee(command.arms, command.recipe, command.data_root, present=False)
    out = _folder(command, study.data.name)
    seeds = range(command.first_seed, command.first_seed + command.seeds)
    planned = [] if command.timing_only else study.planned(seeds, command.every_arm)
    folders = [store.cell_folder(out, cell.arm.name, seed) for cell, seed in planned]
    _retry(command, folders)
    terminal = Terminal(console, sum(not running.settled(folder) for folder in folders), bar=False)
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
        _conclude(out, console, wait=False)
        raise
    _conclude(out, console)
    return failed


def _send(
    command: Command,
    study: running.Study,
    planned: Sequence[tuple[running.Prepared, int]],
    seeds: Sequence[int],
    order: orders.Order,
    progress: Terminal,
    send: orders.Send,
) -> int:
    """The cells, then what needs a machine alone; returns how many failed."""

    def train(cells: Sequence[tuple[running.Prepared, int]]) -> int:
        return orders.run([(cell.arm.name, seed) for cell, seed in cells], order, send, progress)

    out = order.out
    if not (out / "study.json").is_file():
        orders.one(send, order, "open")
    if command.margin or command.until:
        _decide_by(command, out)
    progress.note(f"{out}: {len(planned)} cells, by {command.launcher}")
    failed = _until(command, study, seeds, out, progress, train) if command.until and planned else train(planned)
    if command.profile or running.timing_due(study, out, command.timing_only):
        orders.one(send, order, "measure", command.timing_only, command.profile)
    if command.profile:
        failed += sum((store.profile_folder(out, cell.arm.name) / "failed.json").is_file() for cell in study.cells)
    return failed


def _retry(command: Command, folders: Sequence[Path]) -> None:
    for folder in filter(reading.failed, folders if command.retry_failed else ()):
        (folder / "failed.json").unlink()


def _left(
    command: Command, study: running.Study, planned: Sequence[tuple[running.Prepared, int]], out: Path
) -> list[tuple[running.Prepared, int]]:
    """The cells without result or failure; InputError if the disk has no room for them."""
    left = [cell for cell in planned if not running.settled(store.cell_folder(out, cell[0].arm.name, cell[1]))]
    need, free = running.need(left), shutil.disk_usage(out).free
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
    if isinstance(first := study.cells[0].config, Foreign):
        console.print(first.sentence, highlight=False, markup=False, soft_wrap=True)


def _run(
    command: Command,
    study: running.Study,
    planned: Sequence[tuple[running.Prepared, int]],
    seeds: Sequence[int],
    out: Path,
    terminal: Terminal,
    stop: Stop,
) -> int:
    """The cells, then what needs the machine alone; returns how many failed."""
    with terminal as progress:
        if command.margin or command.until:
            _decide_by(command, out)
        spawning = command.jobs > 1 and not command.worker and bool(planned)
        for cell in study.cells if spawning else ():
            timing.ceiling(out, cell)  # measured before others compute beside
        with (
            jobs.workers(command.jobs - 1, progress.note, "--data", command.recipe.data) if spawning else nullcontext()
        ):
            train = partial(running.run, preset=command.preset, out=out, progress=progress, stop=stop)
            seedwise = bool(command.until and planned)
            failed = _until(command, study, seeds, out, progress, train) if seedwise else train(planned)
        if command.worker:
            return failed
        failed += running.measured(study, out, progress, command.timing_only, command.profile)
    return failed


def _conclude(out: Path, console: Console, wait: bool = True) -> None:
    """Write the report of what is there, one process at a time."""
    if any(out.glob("cells/*/seed*/result.json")):
        from ablations.reporting.terminal import conclude  # figures and statistics: not for --list or a refusal

        with claims.waited(out / "report") if wait else claims.claimed(out / "report") as mine:
            if wait or mine:
                conclude(out, console)


def _decide_by(command: Command, out: Path) -> None:
    """Keep the margins, and how often a run looks before it stops, for the report."""
    from ablations.analysis import verdicts

    before, looks = verdicts.read_decisions(out)
    looks = max(looks, command.seeds - 1) if command.until else looks
    store.write_json(out / "margins.json", {"margins": before | margins(command)["margin"], "looks": looks})


def _until(
    command: Command,
    study: running.Study,
    seeds: Sequence[int],
    out: Path,
    progress: Terminal,
    train: Callable[[Sequence[tuple[running.Prepared, int]]], int],
) -> int:
    """Train until all is decided; returns how many cells failed."""
    from ablations.analysis import comparisons, verdicts

    asked = margins(command)["until"]
    count, failed, why = running.until(
        lambda: verdicts.decided(comparisons.compare([out]), asked),
        seeds,
        60.0 if command.max_minutes is None else command.max_minutes,
        lambda seed: train([(c, s) for c, s in study.planned(seeds, command.every_arm) if s == seed]),
    )
    progress.note(f"--until {' '.join(command.until)}: {count} of at most {len(seeds)} seeds; {why}")
    return failed


def foresee(command: Command, console: Console) -> None:
    """Print the account of every arm."""
    budget = None if command.budget is None else read_bytes(command.budget)
    study = running.foresee(command.arms, command.recipe, command.data_root, present=False)
    planned = []
    for entry in plan.entries(study.cells, command.recipe.engine == "compiled", budget):
        planned.append(entry)
        if not command.json and console.is_terminal:
            console.print(f"{len(planned)} of {len(study.cells)}: {entry['arm']}", end="\r")
    if command.json:
        print(json.dumps(planned, indent=2))
    else:
        recipe = study.recipe
        share = f"{study.cells[0].images} of " if recipe.parallel else ""
        of = f" in one of {recipe.processes} processes ({recipe.parallel})" if recipe.parallel else ""
        what = f"{share}{recipe.batch_size} images{of} on {recipe.device}, {recipe.precision}, engine {recipe.engine}"
        plan.show(console, planned, what, budget)


def foresee_hours(command: Command, console: Console) -> None:
    """Print how long the cells take that are left."""
    from ablations.analysis import factors, planning  # statistics, which no refusal should wait for

    study = running.foresee(command.arms, command.recipe, command.data_root, present=command.recipe.parallel is None)
    out, each = _folder(command, study.data.name), study.recipe.processes or 1
    seconds, source = hours.step_seconds(study, out)
    planned = study.planned(range(command.first_seed, command.first_seed + command.seeds), command.every_arm)
    left = [(cell, seed) for cell, seed in planned if not reading.finished(store.cell_folder(out, cell.arm.name, seed))]
    cells = hours.cells(left, seconds)
    if command.json:
        print(json.dumps({"step_seconds": seconds, "source": source, **hours.summary(cells, each)}, indent=2))
        return
    hours.show(console, cells, seconds, source, each)
    margin = margins(command)["margin"].get("accuracy", 0.5)
    names = {name for arm in seconds for name in factors.levels(arm)}
    console.print(planning.sentence(out, margin, len(names)), highlight=False, soft_wrap=True)


def _folder(command: Command, data: str) -> Path:
    """The study's folder."""
    return command.out or Path("runs") / f"{command.preset}-{_file_name(data)}"


def _file_name(data: str) -> str:
    """A data set's name as part of a folder's name: `folder:a/b@coarse` -> `b-coarse`, `plugin:c` -> `c`."""
    path, at, kind = data.removeprefix("plugin:").removeprefix("folder:").partition("@coarse")
    return f"{Path(path).resolve().name if data.startswith('folder:') else path}{'-coarse' if at else kind}"


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


def main() -> None:
    """Exit status: 0; 1 if a cell failed; 2 for bad input or a full disk; 75 if --max-minutes were over; 130 and 143
    if told to end by SIGINT and SIGTERM. After the last three, the same command continues."""
    console = Console(stderr="--json" in sys.argv[1:], quiet=not processes.leads(), markup=False, highlight=False)
    stop = Stop()
    try:
        with one_message(processes.named):
            plugins.load(_all("--plugin", sys.argv[1:]))
            if "--list" in sys.argv[1:]:
                describe(console)
                return
            command = read(sys.argv[1:], console)
            commands = each(command)
            if command.plan:
                (foresee_hours if command.hours else foresee)(command, console)
                return
            with stop.listening(command.max_minutes):
                if command.worker:
                    jobs.follow_parent()
                try:
                    with processes.joined(machine.named(command.recipe.device)):
                        failed = sum(execute(one, console, stop) for one in commands)
                except running.Poisoned as error:
                    print(f"{error}: the next cell begins in a fresh process", file=sys.stderr, flush=True)
                    left = minutes_left()
                    os.execv(sys.executable, jobs.command(*(["--max-minutes", str(left)] if left else [])))
    except KeyboardInterrupt as error:
        told = error.status if isinstance(error, Stopped) else 130
        print("interrupted; the same command continues", file=sys.stderr)
        sys.exit(told)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
