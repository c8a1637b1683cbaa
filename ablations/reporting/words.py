"""What a study says, in words: each sentence from its numbers."""

from collections.abc import Mapping
from math import isnan
from typing import Any

from ablations.analysis.comparisons import Comparisons
from ablations.analysis.estimates import seeds_for
from ablations.analysis.factors import label, levels, of_contract
from ablations.analysis.responses import BY_NAME, COMPARED
from ablations.reporting.formatting import interval, listed, signed, told
from ablations.study.arms import AGAIN, BASELINE

_SMALL = 0.002  # accuracy: the difference one usually asks for
_WORDS = {  # of a response that got worse, better
    "accuracy": ("less accurate", "more accurate"),
    "step time": ("slower", "faster"),
    "peak memory": ("more memory", "less memory"),
}
_UNPAIRED = "No arm shares a seed with the baseline: there are no differences."


def sentences(comparisons: Comparisons) -> list[str]:
    """The summary of a report, a sentence or two each."""
    study, compared = comparisons.study, comparisons.compared
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
    elif not compared:
        out.append("There is one arm: nothing to compare. `--arms all`, in the same folder, adds the others.")
    if seeds == 1 and compared:
        out.append("**One seed: no interval.** `--seeds 3` gives them.")
    if seeds == 2:
        out.append("**Two seeds** tell little of how seeds vary: intervals are very wide. `--seeds 5` narrows them.")
    if effects := _optimizations(comparisons):
        brackets = (
            "; in brackets 95 % intervals that hold together for all effects of a response, bold what they tell from "
            "no change"
        )
        average = "What each optimization does, as the mean over the settings of the others"
        out += [average + brackets * (seeds > 1) + ":", *effects, *_interactions(comparisons)]
    if compared:
        out += [*_leaders(comparisons), *_resolution(comparisons)]
    return out + _repeatability(comparisons) + _exactness(comparisons) + _holes(comparisons)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def _optimizations(comparisons: Comparisons) -> list[str]:
    """What each optimization does to accuracy, time and memory, on average over the others."""
    frame = comparisons.effect_table
    if frame.empty:
        return []
    mains = frame[(frame["order"] == 1) & frame["response"].isin(COMPARED)]
    out = []
    for name, rows in mains.groupby("effect", sort=False):
        clear, still, bare = [], [], []
        for row in rows.to_dict("records"):
            if isnan(row["se"]):
                bare.append(_value(row))
            elif told(row):
                better = row["estimate"] * BY_NAME[row["response"]].better > 0
                clear.append(f"**{_WORDS[row['response']][better]}** ({_value(row)})")
            else:
                still.append(_value(row))
        said = [", ".join(clear)] if clear else []
        said += [f"not told from no change: {', '.join(still)}"] if still else []
        said += [f"without an interval: {', '.join(bare)}"] if bare else []
        out.append(f"`{name}`: {'; '.join(said)}.")
    return out


def _value(row: Mapping[Any, Any], together: bool = True) -> str:
    """`step time +9.5 % [+7.6, +11.6]`."""
    value, _, bounds = interval(row, together).partition(" ")
    return " ".join(filter(None, (row["response"], value, BY_NAME[row["response"]].unit, bounds)))


def _interactions(comparisons: Comparisons) -> list[str]:
    """Which pairs do more or less together than their effects add up to."""
    frame = comparisons.effect_table
    out = []
    for name, rows in frame[(frame["order"] == 2) & frame["se"].notna()].groupby("response", sort=False):
        clear = [row for row in rows.to_dict("records") if told(row)]
        largest = sorted(clear, key=lambda row: -abs(row["estimate"]))[:3]
        texts = ", ".join(f"`{row['effect']}` {_value(row).removeprefix(f'{name} ')}" for row in largest)
        more = "the largest " if len(clear) > len(largest) else ""
        out.append(f"{name} {len(clear)} of {len(rows)}" + (f" ({more}{texts})" if clear else ""))
    return [f"Two-way interactions told from zero: {'; '.join(out)}."] if out else []


def _leaders(comparisons: Comparisons) -> list[str]:
    """The best arm of each response, and how sure that is."""
    study, out = comparisons.study, []
    for name in COMPARED:
        response = BY_NAME[name]
        paired = {arm: found for arm in comparisons.compared if (found := comparisons.against(name, arm))}
        best = max(paired, key=lambda arm: response.better * paired[arm].value, default=None)
        if best is None or response.better * paired[best].value <= 0:
            out.append(f"No arm has a better mean {name} than the baseline in the same seeds." if paired else _UNPAIRED)
            continue
        found = paired[best]
        text = f"Best mean {name} beside the baseline: `{best}`, {signed(response, found.value)} {response.unit}"
        if found.seeds < len(study.seeds):
            text += f", from {_count(found.seeds, 'seed')}"
        if name == "accuracy" and found.se > 0:
            text += f" (confidence {found.above:.2f} that it is; the best of {len(paired)} is flattered by the choice)"
        out.append(text + ".")
    seeds = ", over the seeds that each arm has" if study.missing else ""
    out.append(
        f"Pareto front of mean accuracy, step time and peak memory{seeds} (none of these has better means in all three "
        f"than another of them; many of the differences are within noise): {listed(comparisons.front(*COMPARED))}."
    )
    return list(dict.fromkeys(out))


def _resolution(comparisons: Comparisons) -> list[str]:
    """How wide the intervals are, and what would narrow them."""
    found = [e for arm in comparisons.compared if (e := comparisons.against("accuracy", arm)) and e.se > 0]
    if not found:
        return []
    typical = sorted(found, key=lambda e: e.se)[len(found) // 2]
    of = len(comparisons.compared)
    needed = seeds_for(_SMALL, typical, of)
    images = comparisons.study.cells[0].correct.shape[1]
    more = f"{needed:,} seeds would do" if needed else f"no number of seeds would do with {images:,} validation images"
    return [
        f"Resolution: with {typical.seeds} seeds and {images:,} validation images, the intervals of {of} arms together "
        f"reach {100 * (typical.interval(of=of)[1] - typical.value):.1f} points to either side of an arm's difference "
        f"in accuracy from the baseline (the arm of median spread); for {100 * _SMALL:.1f} points {more}."
    ]


def _repeatability(comparisons: Comparisons) -> list[str]:
    """The baseline against itself."""
    frame = comparisons.against_baseline
    rows = [] if frame.empty else frame[frame["arm"] == AGAIN].to_dict("records")
    if not rows:
        return []
    texts = ", ".join(_value(row, together=False) for row in rows)
    return [f"Repeatability: the baseline trained a second time with the same seeds (single intervals): {texts}."]


def _exactness(comparisons: Comparisons) -> list[str]:
    """How far arms lie apart that differ by an exact optimization alone. (Arms that sample may draw from other maps
    beside it.)"""
    exact, sampled = of_contract("exact"), of_contract("unbiased gradient")
    apart = {AGAIN, *([BASELINE] if comparisons.baseline_differs else [])}
    names = [arm for arm in comparisons.study.arms if arm not in apart and not sampled & set(levels(arm))]
    arms = {frozenset(levels(arm).items()): arm for arm in names}
    gaps = []
    for setting, arm in arms.items():
        for factor, level in setting:
            other = arms.get(setting - {(factor, level)})
            if factor in exact and other and (found := comparisons.against("accuracy", arm, other)):
                gaps.append((abs(found.value), arm, other))
    if not gaps:
        return []
    gap, arm, other = max(gaps)
    return [
        f"Exact optimizations: over {_count(len(gaps), 'pair')} of arms without sampling that differ by one alone, "
        f"mean accuracies differ by at most {100 * gap:.2f} points" + (f" (`{arm}` and `{other}`)." if gap else ".")
    ]


def _holes(comparisons: Comparisons) -> list[str]:
    """Cells that are not there, and effects that cannot be told without them."""
    out, study = [], comparisons.study
    if study.missing:
        shown = ", ".join(f"`{arm}` seed {seed}" for arm, seed in study.missing[:5])
        more = f" and {len(study.missing) - 5} more" if len(study.missing) > 5 else ""
        out.append(f"Not there, and fitted without: {shown}{more}.")
    found = comparisons.effects["step time"]
    if comparisons.baseline_differs and BASELINE in study.arms:
        out.append("The baseline is another model than the other arms: effects and interactions leave it out.")
    if found.design.apart and comparisons.compared:
        pairs = [label(pair) for pair in found.design.apart]
        text = ", ".join(pairs[:5]) + (f" and {len(pairs) - 5} more" if len(pairs) > 5 else "")
        out.append(f"These arms do not tell apart the interactions {text}; effects are fitted as if there were none.")
    if found.lost and comparisons.compared:
        out.append(f"These arms do not determine the effects {', '.join(label(term) for term in found.lost)}.")
    incomplete = [e for e in found.effects if 0 < e.estimate.seeds < len(study.seeds)]
    if incomplete:
        texts = [f"`{label(e.term)}` {e.estimate.seeds}" for e in incomplete]
        out.append(f"Effects from fewer seeds than {len(study.seeds)}: {', '.join(texts)}.")
    return out
