"""Arms: the model under a set of registered transforms, written like `decatt+flash` or `flash@tiled`."""

import inspect
import itertools
from ast import literal_eval
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from math import prod
from typing import Any, get_args, get_type_hints

import torch

from core import process
from core.errors import InputError, choose, said
from core.layers import EXACT
from core.ops import Ops, Rewrite
from core.transforms.registry import REGISTRY, controls

BASELINE = "baseline"
AGAIN = "baseline-again"  # the same arm a second time: what differs between the two is noise
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PUBLISHED = (  # the eight arms of study 1
    *(BASELINE, "decatt", "mrt", "flash"),
    *("flash+mrt", "decatt+flash", "decatt+mrt", "decatt+flash+mrt"),
)
FINETUNE = (BASELINE, "crs@0.5", "crs@0.3", "recompute", "bf16")  # study 2, and the controls that save memory too

MOST = 4096  # arms of a lattice

Settings = Mapping[str, Mapping[str, Any]]  # parameters by transform name


class Conflict(InputError):
    """Optimizations that cannot be combined."""


@dataclass(frozen=True)
class Arm:
    """A set of transforms under its canonical name: parts in alphabetical order, default values left out."""

    name: str
    transforms: tuple[Rewrite, ...]
    parameters: Settings = field(default_factory=dict)
    """Every parameter of its transforms, by their names."""
    precision: str | None = None
    """fp32 or bf16 instead of the recipe's."""

    @cached_property
    def ops(self) -> Ops:
        """EXACT under all transforms; InputError if two of them cannot be combined."""
        return reduce(lambda ops, transform: transform(ops), self.transforms, EXACT)


def parse(name: str, settings: Settings | None = None) -> Arm:
    """The arm of a name: parts joined by + in any order, each NAME or NAME@VALUE (the first parameter), or a
    precision.

    settings: parameters for the transforms by name, below a value in the arm's own name. Raises InputError
    for an unknown part, a part twice, an illegal value; Conflict for transforms that cannot be combined.
    """
    if name in (BASELINE, AGAIN):
        return Arm(name, ())
    texts = name.split("+")
    precisions = [text for text in texts if text in PRECISIONS]
    if len(precisions) > 1:
        raise InputError(f"arm '{name}' has two precisions; choose one")
    try:
        parts = [_part(text, settings or {}) for text in texts if text not in PRECISIONS]
    except InputError as error:  # which does not tell it where + is of a value, as in decatt@1e+2
        raise InputError(f"arm '{name}': {error}" if len(texts) > 1 else error) from error
    parts.sort(key=lambda part: part[0])
    bases = [base for _, base, _ in parts]
    if twice := [base for base in bases if bases.count(base) > 1]:
        raise InputError(f"arm '{name}' has {twice[0]} twice; write each optimization once")
    built = {base: _built(base, given) for _, base, given in parts}
    arm = Arm(
        "+".join(sorted([*precisions, *(part for part, _, _ in parts)])),
        tuple(rewrite for rewrite, _ in built.values()),
        {base: parameters for base, (_, parameters) in built.items()},
        precisions[0] if precisions else None,
    )
    try:
        _ = arm.ops
    except InputError as error:
        raise Conflict(f"arm '{arm.name}': {error}") from error
    return arm


def _part(text: str, settings: Settings) -> tuple[str, str, dict[str, Any]]:
    """Canonical name, transform and the parameters given to it, of one part."""
    base, at, value = text.strip().partition("@")
    choose("optimization", base, [*REGISTRY, BASELINE, *PRECISIONS])
    if base == BASELINE:
        raise InputError("'baseline' stands alone: it is the arm without optimizations")
    if base in PRECISIONS:
        raise InputError(f"'{text}' has a value; write {base}")
    first = next(iter(inspect.signature(REGISTRY[base].build).parameters.values()), None)
    given, name = dict(settings.get(base, {})), base
    if first is None:
        if at:
            raise InputError(f"'{text}' has a value, and {base} takes none; write {base}")
    elif at:
        given[first.name] = convert(base, first.name, value)
        if given[first.name] != settings.get(base, {}).get(first.name, first.default):
            name = _at(base, given[first.name])
    elif first.default is first.empty and first.name not in given:
        raise InputError(f"'{base}' needs its {first.name}: write for example {_example(base)}")
    return name, base, given


@process.as_it_was()
def _built(base: str, given: Mapping[str, Any]) -> tuple[Rewrite, dict[str, Any]]:
    """The transform and all its parameters; InputError, with its name, for one from outside that raises, exits, or is
    none."""
    try:
        bound = inspect.signature(REGISTRY[base].build).bind(**given)
        bound.apply_defaults()
        made = REGISTRY[base].build(*bound.args, **bound.kwargs)
        if not isinstance(made(EXACT), Ops):
            raise TypeError("it is no function from Ops to Ops")
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"optimization '{base}' cannot be built: {said(error)}") from error
    return made, dict(bound.arguments)


def _at(base: str, value: Any) -> str:
    value = value + 0.0 if isinstance(value, float) else value  # -0 is 0
    short = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    short = short.replace("e+", "e")  # + joins parts
    if "/" in short:
        raise InputError(f"{base}@{short}: an arm's name is its folder's; pass a value without /")
    return f"{base}@{short}"


def _example(base: str) -> str:
    levels = REGISTRY[base].levels
    return _at(base, levels[0]) if levels else f"{base}@VALUE"


def convert(base: str, parameter: str, text: str) -> Any:
    """The value of a transform's parameter from text, by the parameter's type; InputError if it is not one."""
    hint = get_type_hints(REGISTRY[base].build).get(parameter)
    kinds = get_args(hint) or (hint,)
    if text == "None" and type(None) in kinds:
        return None
    if bool in kinds:
        return choose(f"{base} {parameter}", text, ("True", "False")) == "True"
    if kinds[0] in (int, float):
        try:
            return kinds[0](text)
        except ValueError:
            kind = "a whole" if kinds[0] is int else "a"
            raise InputError(f"{base} {parameter} '{text}' is not {kind} number; write {_example(base)}") from None
    if hint is str or kinds == (str, type(None)):
        return text
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # a word, or what the parser gives up on
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


def lattice(parts: Sequence[str] = ()) -> list[str]:
    """The names of every combination of these parts, baseline first: each optimization absent or at one of the levels
    that are given for it, else at one of its own. Without parts, of all optimizations but the controls and `more`."""
    chosen = set(parts) or {name for name, t in REGISTRY.items() if t.lattice and name not in controls()}
    factors: dict[str, list[str]] = {}
    for part in sorted(chosen):
        base = choose("optimization", part.partition("@")[0], [*REGISTRY, *PRECISIONS])
        factors.setdefault(base, [""]).extend([part] if part != base else _leveled(base))
    if (count := prod(map(len, factors.values()))) > MOST:
        raise InputError(f"{len(factors)} factors have {count:,} combinations, and {MOST:,} are the most; name fewer")
    subsets = [[part for part in combination if part] for combination in itertools.product(*factors.values())]
    return ["+".join(parts) or BASELINE for parts in sorted(subsets, key=len)]


def half(parts: Sequence[str]) -> list[str]:
    """The half of a lattice with the baseline, of resolution as many as there are factors: the arms of an even number
    of optimizations (Box, Hunter and Hunter, Statistics for Experimenters, chapter 6).

    Raises InputError for less than four factors, with which main effects and interactions could not be told apart, and
    for factors of more than two levels.
    """
    whole = lattice(parts)
    factors = {part.partition("@")[0] for part in parts}
    if len(whole) != 2 ** len(factors):
        raise InputError(
            f"half of the lattice {','.join(parts)} takes factors of two levels: write one value for each, such as "
            "crs@0.3"
        )
    if len(factors) < 4:
        raise InputError(
            f"half of a lattice of {len(factors)} factors does not tell main effects from interactions; name at least "
            "4, or leave out --design half"
        )
    return [name for name in whole if name == BASELINE or name.count("+") % 2]


def _leveled(base: str) -> list[str]:
    """An optimization at each of its levels, or as it is."""
    levels = REGISTRY[base].levels if base in REGISTRY else ()
    return [_at(base, level) for level in levels] or [base]


def optimizations(name: str) -> list[str]:
    """What an arm's name consists of, without values, precision and the baselines."""
    parts = (part.partition("@")[0] for part in name.split("+"))
    return [part for part in parts if part not in (BASELINE, AGAIN, *PRECISIONS)]


def twin(name: str) -> str:
    """The arm without its exact optimizations: what it learns is the arm's own in distribution."""
    if name in (BASELINE, AGAIN):
        return BASELINE
    exact = [name for name, t in REGISTRY.items() if t.contract == "exact"]
    parts = [part for part in name.split("+") if part.partition("@")[0] not in exact]
    return "+".join(parts) or BASELINE


def _group(name: str) -> Sequence[str]:
    """What `all` (the lattice, the baseline a second time, and the controls), `published`, `finetune`, `controls` and
    `more` (the optimizations outside the lattice; each alone and with flash) stand for; any other name for itself."""
    tested, further = ([n for n in REGISTRY if n in controls()], [n for n, t in REGISTRY.items() if not t.lattice])
    alone = [name + other for name in tested for other in ("", "+flash")]
    more = [part + other for name in further for part in _leveled(name) for other in ("", "+flash")]
    groups = {"all": [*lattice(), AGAIN, *alone], "published": PUBLISHED, "finetune": FINETUNE, "controls": alone}
    return (groups | {"more": more}).get(name, [name])


def _words(text: str) -> list[tuple[str, Sequence[str]]]:
    """The words of a list of arms, and what each stands for; after `lattice:` or `half:` all others are its factors."""
    words = text.replace(" ", "").split(",")
    for i, word in enumerate(words):
        kind, colon, first = word.partition(":")
        if colon:
            of = {"lattice": lattice, "half": half}[choose("group", kind, ("lattice", "half"))]
            return [*((w, _group(w)) for w in words[:i]), (word, of([first, *words[i + 1 :]]))]
    return [(word, _group(word)) for word in words]


def select(
    text: str,
    settings: Settings | None = None,
    pretrained: bool = False,
    check: Callable[[Arm], object] = lambda arm: None,
) -> tuple[list[Arm], dict[str, str]]:
    """The arms of a comma-separated list, each once, in order: names, groups (see `_group`), and last `lattice:A,B,…`,
    every combination of these, or `half:A,B,…`, half of them. And those of `all`, `controls`, `more` and the
    combinations that are left out, since two of their optimizations cannot be combined, or one needs what is not
    there: why.

    pretrained: whether there are pretrained weights. check: raises Conflict for an arm that the model cannot take.
    """
    arms: dict[str, Arm] = {}
    refused: dict[str, str] = {}
    for word, names in _words(text):
        for name in names:
            try:
                arm = parse(name, settings)
                _need_weights(arm, pretrained)
                check(arm)
                arms[arm.name] = arm
            except Conflict as error:
                if len(names) == 1 or word in ("published", "finetune"):
                    raise
                refused[name] = str(error)
    return list(arms.values()), refused


def _need_weights(arm: Arm, pretrained: bool) -> None:
    if not pretrained and (needing := [name for name in arm.parameters if REGISTRY[name].pretrained]):
        raise Conflict(
            f"arm '{arm.name}': {needing[0]} is for pretrained weights; pass --weights, or leave it out (a model of "
            "others brings its own: --model timm:NAME@pretrained)"
        )
