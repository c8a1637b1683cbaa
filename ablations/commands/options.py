"""The options of run.py, and what of them is wrong."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from ablations.study import jobs, launchers
from ablations.study.presets import ABOUT, ARMS, PRESETS, SEEDS
from ablations.study.recipes import OURS, SEEDS_MOST, Recipe
from ablations.study.speaking import asked
from core.data import sets
from core.errors import InputError, choose, within

MOST = 1024  # processes of a machine, processors of a cell
YEAR = 525_600  # minutes
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
    """Processes on this machine that share the cells and its threads, one GPU each where there are several; of the
    preset quick on a CPU as many as there are threads, at most 8. Two of this command on one folder share its cells,
    too, on any machines that see it."""
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
    preset, device = _last("--preset", arguments), _last("--device", arguments)
    gpu = device == "cuda" or (device != "cpu" and torch.cuda.is_available())
    if preset is None:
        preset, why = ("matched", "for a GPU") if gpu else ("quick", "no accelerator in use")
        about = "" if "--plan" in arguments else f": {ABOUT[preset]}"
        if "--worker" not in arguments:
            console.print(f"preset {preset} ({why}){about}; --preset chooses another")
    base = PRESETS[choose("preset", preset, PRESETS)]
    several = (
        preset == "quick" and not gpu and not {"--launcher", "--parallel"} & {w.partition("=")[0] for w in arguments}
    )
    default = Command(
        arms=ARMS.get(preset, "all"),
        preset=preset,
        seeds=SEEDS.get(preset, 1),
        jobs=jobs.suggested() if several else 1,
        recipe=base,
    )
    command = asked(Command, arguments, default=default)
    recipe = of_its_model(command.recipe, base)
    settings = recipe.set if recipe.set == base.set else base.set + recipe.set
    return checked(replace(command, recipe=replace(recipe, set=settings)))


def checked(command: Command) -> Command:
    """The command with what its design stands for; InputError for values out of their range, and for options that do
    not belong together."""
    within("seeds", command.seeds, 1, SEEDS_MOST)
    within("first seed", command.first_seed, 0, 2**63 - SEEDS_MOST - 1)
    within("jobs", command.jobs, 1, MOST)
    within("cpus", command.cpus, 1, MOST)
    choose("design", command.design, ("full", "half"))
    if command.design == "half":
        if "lattice:" not in command.arms:
            raise InputError("--design half is half of a lattice, and --arms has none: write --arms lattice:A,B,C,D")
        command = replace(command, arms=command.arms.replace("lattice:", "half:"))
    if command.until and command.seeds < 2:
        raise InputError("--until with one seed decides nothing: pass --seeds with the most there may be, such as 8")
    _check_launcher(command)
    if command.max_minutes is not None and not 0 < command.max_minutes <= YEAR:
        raise InputError(f"max minutes {command.max_minutes} is outside 0 to {YEAR:,}, a year")
    if command.margin or command.until:
        margins(command)
    if (command.json or command.budget is not None) and not command.plan:
        raise InputError(f"{'--json' if command.json else '--budget'} belongs to --plan; add --plan")
    if command.hours and (not command.plan or command.budget is not None):
        raise InputError("--hours belongs to --plan, without --budget; write --plan --hours")
    for option, given in (
        ("--profile", command.profile),
        ("--jobs", command.jobs > 1),
        ("--launcher", command.launcher != "here"),
    ):
        if command.recipe.parallel and given:
            raise InputError(f"{option} is for cells of one process each; leave out --parallel, or {option}")
    if command.until and command.timing_only:  # its looks at the seeds would be told to the report
        raise InputError("--until trains seeds, and --timing-only trains nothing; leave out one")
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
    for option, given, belongs in (
        ("--jobs", command.jobs > 1, ("here",)),
        ("--cpus", command.cpus > 1, ("ray", "slurm")),
        ("--ray-address", bool(command.ray_address), ("ray",)),
        ("--slurm", bool(command.slurm), ("slurm",)),
    ):
        if given and command.launcher not in belongs:
            raise InputError(f"{option} belongs to --launcher {' or '.join(belongs)}; this is {command.launcher}")
    launchers.read_settings(command.slurm)


def margins(command: Command) -> dict[str, dict[str, float]]:
    """What --margin and --until ask for, by response; InputError for unknown responses and for what is no number."""
    from ablations.analysis import verdicts  # statistics, which no other refusal should wait for

    found: dict[str, dict[str, float]] = {}
    for option in ("margin", "until"):
        words = [text.partition("=")[::2] for text in getattr(command, option)]
        if len(pairs := dict(words)) < len(words):
            raise InputError(f"--{option} {' '.join(getattr(command, option))} has a response twice; write it once")
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
        raise InputError(
            f"{option} is for one data set, and --data has {len(names)}; leave it out, or pass one without a comma"
        )
    folders = [_file_name(name) for name in names]
    if len(set(folders)) < len(names):
        raise InputError(f"--data {','.join(names)} gives two studies one folder; run them one by one, with --out")
    if len(names) > 1:
        for name in names:
            sets.outline(name, command.data_root, command.recipe.image)
    return [replace(command, recipe=replace(command.recipe, data=name)) for name in names]


def folder(command: Command, data: str) -> Path:
    """The study's folder."""
    return command.out or Path("runs") / f"{command.preset}-{_file_name(data)}"


def _file_name(data: str) -> str:
    """A data set's name as part of a folder's name: `folder:a/b@coarse` -> `b-coarse`, `plugin:c` -> `c`."""
    path, at, kind = data.removeprefix("plugin:").removeprefix("folder:").partition("@coarse")
    return f"{Path(path).resolve().name if data.startswith('folder:') else path}{'-coarse' if at else kind}"


def _last(option: str, arguments: list[str]) -> str | None:
    """The last value of an option on a command line, `--option value` or `--option=value`."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    given = [
        value if word == option else word.removeprefix(f"{option}=")
        for word, value in pairs
        if word == option or word.startswith(f"{option}=")
    ]
    return given[-1] if given else None
