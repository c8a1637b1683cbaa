"""What an arm is made of: its factors, and the level of each."""

from collections.abc import Iterable

from ablations.study.arms import AGAIN, BASELINE
from core.transforms.registry import REGISTRY, controls

Term = tuple[tuple[str, str], ...]  # (factor, level) once for a main effect, twice for an interaction


def levels(arm: str) -> dict[str, str]:
    """The factors of an arm that are not off, each with its level: the value in the arm's name, or "on"."""
    if arm in (BASELINE, AGAIN):
        return {}
    parts = (part.partition("@") for part in arm.split("+"))
    return {factor: level or "on" for factor, _, level in parts}


def in_factorial(arm: str) -> bool:
    """Whether an arm belongs to the factorial: no control, and not the baseline's second run."""
    return arm != AGAIN and not controls() & levels(arm).keys()


def label(term: Term) -> str:
    """`crs@0.3 × mrt`."""
    return " × ".join(factor if level == "on" else f"{factor}@{level}" for factor, level in term)


def control_of(optimization: str) -> str | None:
    """The control of `crs@0.3` or another optimization by its label."""
    factor = optimization.partition("@")[0]
    return REGISTRY[factor].control if factor in REGISTRY else None


def controlled(arms: Iterable[str]) -> list[tuple[str, str, str]]:
    """Every arm beside the same arm with one of its optimizations replaced by this one's control: (optimization, arm,
    the other arm), of the pairs that are both there."""
    settings = {arm: levels(arm) for arm in arms if arm != AGAIN}
    out = []
    for arm, setting in settings.items():
        for factor, level in setting.items():
            control = control_of(factor)
            rest = {f: lv for f, lv in setting.items() if f not in (factor, control)}
            out += [
                (label(((factor, level),)), arm, other)
                for other, theirs in settings.items()
                if control in theirs and {f: lv for f, lv in theirs.items() if f != control} == rest
            ]
    return out


def without(term: Term, arms: Iterable[str]) -> dict[str, str | None]:
    """Every arm with a term, and the same arm without it; None where that is not there."""
    settings = {frozenset(levels(arm).items()): arm for arm in arms if arm != AGAIN}
    return {arm: settings.get(setting - set(term)) for setting, arm in settings.items() if set(term) <= setting}


def with_controls(arms: Iterable[str]) -> dict[Term, list[tuple[str, str]]]:
    """Of each control the pairs of an arm with it and the same arm without it."""
    arms = list(arms)
    terms = dict.fromkeys(((f, level),) for arm in arms for f, level in levels(arm).items() if f in controls())
    pairs = {term: [(arm, other) for arm, other in without(term, arms).items() if other] for term in terms}
    return {term: found for term, found in pairs.items() if found}
