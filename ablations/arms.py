"""Arms: the model under a set of registered transforms, written like `decatt+flash` or `flash@tiled`."""

import inspect
import itertools
from ast import literal_eval
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, get_type_hints

from core.errors import InputError, choose
from core.ops import EXACT, Ops, Rewrite
from core.transforms import REGISTRY

BASELINE = "baseline"
PUBLISHED = (  # the eight arms of study 1
    BASELINE,
    "decatt",
    "mrt",
    "flash",
    "flash+mrt",
    "decatt+flash",
    "decatt+mrt",
    "decatt+flash+mrt",
)

Settings = Mapping[str, Mapping[str, Any]]  # parameters by transform name


@dataclass(frozen=True)
class Arm:
    """A set of transforms under its canonical name: parts in alphabetical order, default values left out."""

    name: str
    transforms: tuple[Rewrite, ...]

    @property
    def ops(self) -> Ops:
        """EXACT under all transforms; InputError if two of them cannot be combined."""
        return reduce(lambda ops, transform: transform(ops), self.transforms, EXACT)


def parse(name: str, settings: Settings | None = None) -> Arm:
    """The arm of a name: parts joined by + in any order, each NAME or NAME@VALUE (the first parameter).

    settings: parameters for the transforms by name, below a value in the arm's own name. Raises InputError
    for an unknown part, a part twice, an illegal value, or transforms that cannot be combined.
    """
    if name == BASELINE:
        return Arm(BASELINE, ())
    parts = sorted((_part(text, settings or {}) for text in name.split("+")), key=lambda part: part[0])
    bases = [part.split("@")[0] for part, _ in parts]
    twice = next((base for base in bases if bases.count(base) > 1), None)
    if twice:
        raise InputError(f"arm '{name}' has {twice} twice; write each optimization once")
    arm = Arm("+".join(part for part, _ in parts), tuple(rewrite for _, rewrite in parts))
    try:
        _ = arm.ops
    except InputError as error:
        raise InputError(f"arm '{arm.name}': {error}") from error
    return arm


def _part(text: str, settings: Settings) -> tuple[str, Rewrite]:
    """Canonical name and rewrite of one part."""
    base, at, value = text.strip().partition("@")
    choose("optimization", base, [*REGISTRY, BASELINE])
    if base == BASELINE:
        raise InputError("'baseline' stands alone: it is the arm without optimizations")
    build = REGISTRY[base].build
    first = next(iter(inspect.signature(build).parameters.values()))
    arguments = dict(settings.get(base, {}))
    if at:
        arguments[first.name] = convert(base, first.name, value)
        if arguments[first.name] != settings.get(base, {}).get(first.name, first.default):
            base = _at(base, arguments[first.name])
    elif first.default is first.empty and first.name not in arguments:
        raise InputError(f"'{base}' needs its {first.name}: write for example {_example(base)}")
    return base, build(**arguments)


def _at(base: str, value: Any) -> str:
    return f"{base}@{value:g}" if isinstance(value, float) else f"{base}@{value}"


def _example(base: str) -> str:
    levels = REGISTRY[base].levels
    return _at(base, levels[0]) if levels else f"{base}@VALUE"


def convert(base: str, parameter: str, text: str) -> Any:
    """The value of a transform's parameter from text, by the parameter's type; InputError if it is not one."""
    hint = get_type_hints(REGISTRY[base].build)[parameter]
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise InputError(f"{base} {parameter} '{text}' is not {'a whole' if hint is int else 'a'} number") from None
    if hint is str:
        return text
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def read_settings(assignments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """("decatt.weight=150", …) -> {"decatt": {"weight": 150.0}}; later ones win; InputError for a bad one."""
    out: dict[str, dict[str, Any]] = {}
    for text in assignments:
        target, equals, value = text.partition("=")
        base, dot, parameter = target.partition(".")
        if not (equals and dot):
            raise InputError(f"cannot read setting '{text}'; write NAME.PARAMETER=VALUE, such as decatt.weight=10")
        choose("optimization", base, REGISTRY)
        choose(f"{base} parameter", parameter, inspect.signature(REGISTRY[base].build).parameters)
        out.setdefault(base, {})[parameter] = convert(base, parameter, value)
    return out


def lattice() -> list[str]:
    """The names of every arm: each registered transform absent or at one of its levels; baseline first."""
    choices = [["", *([_at(name, level) for level in t.levels] or [name])] for name, t in sorted(REGISTRY.items())]
    subsets = [[part for part in combination if part] for combination in itertools.product(*choices)]
    return ["+".join(parts) or BASELINE for parts in sorted(subsets, key=len)]


def select(text: str, settings: Settings | None = None) -> list[Arm]:
    """The arms of `all`, `published` or a comma-separated list, each once, in the order written."""
    names = itertools.chain.from_iterable(
        lattice() if name == "all" else PUBLISHED if name == "published" else [name]
        for name in text.replace(" ", "").split(",")
    )
    arms = {arm.name: arm for arm in (parse(name, settings) for name in names)}
    return list(arms.values())
