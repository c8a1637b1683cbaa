"""What a study says, in words: each sentence from its numbers."""

from math import isnan

from ablations.analysis.comparisons import BY_NAME, COMPARED, Views, of_contract
from ablations.analysis.effects import label, levels
from ablations.analysis.estimates import Estimate, resolvable, seeds_for
from ablations.reporting.formatting import interval, listed
from ablations.study.arms import AGAIN, BASELINE

_SMALL = 0.002  # accuracy: the difference one usually asks for


def sentences(views: Views) -> list[str]:
    """The summary of a report, a sentence or two each."""
    study = views.study
    seeds, images = len(study.seeds), study.cells[0].correct.shape[1]
    arms = len([arm for arm in study.arms if arm != AGAIN])
    twice = ", the baseline twice" if AGAIN in study.arms else ""
    out = [
        f"{_count(arms, 'arm')}{twice}, {_count(seeds, 'seed')}, {_count(study.configuration['epochs'], 'epoch')} on "
        f"{study.configuration['data']}, {images:,} validation images: {_count(len(study.cells), 'cell')} finished, "
        f"{len(study.failed)} failed."
    ]
    if BASELINE not in study.arms:
        out.append("There is no baseline: nothing to compare with. `--arms baseline`, in the same folder, adds it.")
    elif not views.compared:
        out.append("There is one arm: nothing to compare. `--arms all`, in the same folder, adds the others.")
    if seeds == 1 and views.compared:
        out.append(_one_seed(views))
    if seeds == 2:
        out.append("**Two seeds** tell little of how seeds vary: intervals are very wide. `--seeds 5` narrows them.")
    if told := _optimizations(views):
        out.append(
            "What each optimization does, as the mean over the settings of the others; in brackets 95 % intervals that "
            "hold together for all effects of a response, bold what they tell from no change:"
        )
        out += [*told, *_interactions(views)]
    if views.compared:
        out += [*_leaders(views), *_resolution(views)]
    return out + _noise_floor(views) + _exactness(views) + _holes(views)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def _one_seed(views: Views) -> str:
    bare = [name for name, noise in views.noise.items() if noise and isnan(noise.deviation)]
    if "step time" in bare:
        return "**One seed and few arms: differences have no error bar.** `--seeds 5` adds them."
    text = (
        "**One seed**: intervals are Lenth's, who takes the noise from the many effects that should be nothing; they "
        "do not see what another seed would change. `--seeds 5` gives real ones."
    )
    if bare:
        text += f" There are too few effects to tell the noise of {' and '.join(bare)}: no intervals."
    return text


def _optimizations(views: Views) -> list[str]:
    """What each optimization does to accuracy, time and memory, on average over the others."""
    by_term = {name: dict(views.effects[name].effects) for name in COMPARED}
    out = []
    for term in views.effects["step time"].design.mains:
        clear, still, bare = [], [], list[str]()
        for name in COMPARED:
            effect = by_term[name].get(term)
            if effect is None:
                continue
            if isnan(effect.se):
                bare.append(_value(views, name, effect))
            elif effect.clear(views.effects[name].together) and BY_NAME[name].visible(effect.value):
                better = effect.value * BY_NAME[name].better > 0
                clear.append(f"**{_WORDS[name][better]}** ({_value(views, name, effect)})")
            else:
                still.append(_value(views, name, effect))
        said = [", ".join(clear)] if clear else []
        said += [f"not told from no change: {', '.join(still)}"] if still else []
        said += [f"without an interval: {', '.join(bare)}"] if bare else []
        if said:
            out.append(f"`{label(term)}`: {'; '.join(said)}.")
    return out


_WORDS = {  # of a response that got worse, better
    "accuracy": ("less accurate", "more accurate"),
    "step time": ("slower", "faster"),
    "peak memory": ("more memory", "less memory"),
}


def _told(name: str, found: Estimate, of: int = 1) -> str:
    """`step time +9.5 % [+7.6, +11.6]`; of: how many intervals hold together."""
    value, _, bounds = interval(BY_NAME[name], found, of).replace("*", "").partition(" ")
    return " ".join(filter(None, (name, value, BY_NAME[name].unit, bounds)))


def _value(views: Views, name: str, effect: Estimate) -> str:
    """An effect with the interval that holds together with those of its response."""
    return _told(name, effect, views.effects[name].together)


def _interactions(views: Views) -> list[str]:
    """Which pairs do more or less together than their effects add up to."""
    out = []
    for name, found in views.effects.items():
        pairs = [e for e in found.effects if len(e.term) == 2 and e.estimate.se >= 0]
        clear = [e for e in pairs if e.estimate.clear(found.together) and BY_NAME[name].visible(e.estimate.value)]
        largest = sorted(clear, key=lambda e: -abs(e.estimate.value))[:3]
        texts = ", ".join(
            f"`{label(e.term)}` {_value(views, name, e.estimate).removeprefix(f'{name} ')}" for e in largest
        )
        if pairs:
            more = "the largest " if len(clear) > len(largest) else ""
            out.append(f"{name} {len(clear)} of {len(pairs)}" + (f" ({more}{texts})" if clear else ""))
    return [f"Two-way interactions told from zero: {'; '.join(out)}."] if out else []


def _leaders(views: Views) -> list[str]:
    """The best arm of each response, and how sure that is."""
    out = []
    for name in COMPARED:
        sign = BY_NAME[name].better
        paired = {arm: found for arm in views.compared if (found := views.against(name, arm))}
        best = max(paired, key=lambda arm: sign * paired[arm].value, default=None)
        if best is None or sign * paired[best].value <= 0:
            out.append(f"No arm has a better mean {name} than the baseline in the same seeds." if paired else _UNPAIRED)
            continue
        found = paired[best]
        text = f"Best mean {name} beside the baseline: `{best}`, {_values_of(name, found.value)}"
        if found.seeds < len(views.study.seeds):
            text += f", from {_count(found.seeds, 'seed')}"
        if name == "accuracy" and found.se > 0:
            text += (
                f" (above it with probability {found.above:.2f}; the best of {len(paired)} is flattered by the choice)"
            )
        out.append(text + ".")
    front = views.front(*COMPARED)
    seeds = ", over the seeds that each arm has" if views.study.missing else ""
    out.append(
        f"Pareto front of mean accuracy, step time and peak memory{seeds} (none of these has better means in all three "
        f"than another of them; many of the differences are within noise): {listed(front)}."
    )
    return list(dict.fromkeys(out))


_UNPAIRED = "No arm shares a seed with the baseline: there are no differences."


def _values_of(name: str, value: float) -> str:
    response = BY_NAME[name]
    return f"{response.text(value)} {response.unit}".rstrip()


def _resolution(views: Views) -> list[str]:
    """The smallest difference from the baseline that this study can see."""
    found = [e for arm in views.compared if (e := views.against("accuracy", arm)) and e.se > 0 and e.seeds > 1]
    if not found:
        return []
    typical = sorted(found, key=lambda e: e.se)[len(found) // 2]
    of = len(views.compared)
    needed = seeds_for(_SMALL, typical, of)
    images = views.study.cells[0].correct.shape[1]
    more = f"{needed:,} seeds would do" if needed else f"no number of seeds would do with {images:,} validation images"
    return [
        f"Resolution: with {typical.seeds} seeds and {images:,} validation images, a difference in accuracy between an "
        f"arm and the baseline is told from zero, by the intervals of {of} arms together, with 80 % probability from "
        f"{100 * resolvable(typical, of):.1f} points on (the arm of median spread); for {100 * _SMALL:.1f} points "
        f"{more}."
    ]


def _noise_floor(views: Views) -> list[str]:
    """The baseline against itself."""
    if not {BASELINE, AGAIN} <= set(views.study.arms):
        return []
    texts = []
    for name in COMPARED:
        found = views.against(name, AGAIN)
        if found is not None:
            texts.append(_told(name, found))
    return [
        f"Noise floor, the baseline trained a second time with the same seeds (single intervals): {', '.join(texts)}."
    ]


def _exactness(views: Views) -> list[str]:
    """How far arms lie apart that differ by an exact optimization alone. (Arms that sample may draw from other maps
    beside it.)"""
    exact, sampled = of_contract("exact"), of_contract("unbiased gradient")
    names = [arm for arm in views.study.arms if arm not in (AGAIN, *views.apart) and not sampled & set(levels(arm))]
    arms = {frozenset(levels(arm).items()): arm for arm in names}
    gaps = []
    for setting, arm in arms.items():
        for factor, level in setting:
            other = arms.get(setting - {(factor, level)})
            if factor in exact and other and (found := views.against("accuracy", arm, other)):
                gaps.append((abs(found.value), arm, other))
    if not gaps:
        return []
    gap, arm, other = max(gaps)
    return [
        f"Exact optimizations: over {_count(len(gaps), 'pair')} of arms without sampling that differ by one alone, "
        f"mean accuracies differ by at most {100 * gap:.2f} points" + (f" (`{arm}` and `{other}`)." if gap else ".")
    ]


def _holes(views: Views) -> list[str]:
    """Cells that are not there, and effects that cannot be told without them."""
    out, study = [], views.study
    if study.missing:
        shown = ", ".join(f"`{arm}` seed {seed}" for arm, seed in study.missing[:5])
        more = f" and {len(study.missing) - 5} more" if len(study.missing) > 5 else ""
        out.append(f"Not there, and fitted without: {shown}{more}.")
    found = views.effects["step time"]
    if views.apart and BASELINE in study.arms:
        out.append("The baseline is another model than the other arms: effects and interactions leave it out.")
    if found.design.apart and views.compared:
        pairs = [label(pair) for pair in found.design.apart]
        text = ", ".join(pairs[:5]) + (f" and {len(pairs) - 5} more" if len(pairs) > 5 else "")
        out.append(f"These arms do not tell apart the interactions {text}; effects are fitted as if there were none.")
    if found.lost and views.compared:
        out.append(f"These arms do not determine the effects {', '.join(label(term) for term in found.lost)}.")
    incomplete = [e for e in found.effects if 0 < e.estimate.seeds < len(study.seeds)]
    if incomplete:
        texts = [f"`{label(e.term)}` {e.estimate.seeds}" for e in incomplete]
        out.append(f"Effects from fewer seeds than {len(study.seeds)}: {', '.join(texts)}.")
    return out
