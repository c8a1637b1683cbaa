"""A study from Python, as tables: `run` trains what the command would, `load` reads what it left.

import ablations
study = ablations.run("runs/mine", arms="baseline,flash", epochs=1)
study.verdicts
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from pydantic import ValidationError
from rich.console import Console

from ablations.analysis.comparisons import compare
from ablations.commands.conducting import execute
from ablations.commands.options import Command, checked, of_its_model
from ablations.study import schema
from ablations.study.presets import PRESETS
from ablations.study.signals import Stop
from core import plugins
from core.errors import InputError, choose
from core.foreign import sources
from core.weights import pretrained


class Study(NamedTuple):
    """What a study found.

    verdicts: a row an optimization and response; estimates in points and percent.
    effects: main effects and interactions of each response; of step time and peak memory in natural logarithms.
    means: the mean of each response by arm. cells: a row a cell, its result and responses. failed: cells without one.
    """

    verdicts: pd.DataFrame
    effects: pd.DataFrame
    means: pd.DataFrame
    cells: pd.DataFrame
    failed: pd.DataFrame


def load(*folders: str | Path, plugin: Sequence[str] = ()) -> Study:
    """The study in a folder, or several joined. plugin: files that its optimizations are in.

    Raises InputError for a folder without a study, and for studies that cannot be joined.
    """
    if not folders:
        raise InputError("no study given; write ablations.load('runs/NAME')")
    plugins.load(plugin)
    found = compare([_path("folder", folder) for folder in folders])
    failed = pd.DataFrame(found.study.failed)
    return Study(found.verdicts, found.effect_table, found.means, found.cells, failed)


def run(
    out: str | Path,
    arms: str = "all",
    recipe: str = "quick",
    *,
    seeds: int = 1,
    data_root: str | Path = "data",
    quiet: bool = True,
    **values: Any,
) -> Study:
    """Train arms as `vit-ablations --out … --arms … --preset …` does, or continue, and return what was found.

    out: the study's folder. recipe: a preset. values: what of it is another, such as epochs=1,
    model="timm:vit_tiny_patch16_224", set=("decatt.weight=10",) or plugin=("mine.py",).
    Raises InputError for what the command refuses.
    """
    base = PRESETS[choose("preset", recipe, PRESETS)]
    for name in values:
        choose("recipe value", name, vars(base))
        if name in ("set", "plugin") and isinstance(values[name], str):  # whose letters would each be one
            raise InputError(f"recipe value {name}={values[name]!r} is one text; write {name}=({values[name]!r},)")
    values["set"] = (*base.set, *values.get("set", ()))
    changed = of_its_model(replace(base, **values), base)
    try:
        schema.Settings.model_validate(vars(changed))
    except ValidationError as error:
        raise InputError(f"recipe value {schema.said(error)}") from error
    pretrained.load.cache_clear()  # of what a file held at an earlier call
    sources.load.cache_clear()
    if not isinstance(seeds, int):
        raise InputError(f"seeds {seeds!r} is no whole number; write for example seeds=3")
    out, root = _path("out", out), _path("data_root", data_root)
    whole = Command(arms=str(arms), preset=recipe, seeds=seeds, out=out, data_root=root, recipe=changed)
    execute(checked(whole), Console(quiet=quiet), Stop())
    return load(out, plugin=changed.plugin)


def _path(name: str, value: Any) -> Path:
    try:
        return Path(value).expanduser()
    except TypeError as error:
        raise InputError(f"{name} {value!r} is no path; write for example 'runs/NAME'") from error
