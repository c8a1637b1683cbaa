"""What is decided of each optimization: better, worse, no worse than a margin, or undecided.

A verdict reads one interval, that of the optimization's mean effect over the settings of the others; the intervals of a
response hold together over all optimizations (Šidák), so that of all its verdicts one or more is wrong in at most 5 %
of studies. "No worse" is two one-sided tests (Schuirmann, J. Pharmacokinetics and Biopharmaceutics 15, 1987) at the
2.5 % that this interval leaves on each side.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from math import isnan, log1p, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from scipy import stats

from ablations.analysis.effects import differences
from ablations.analysis.estimates import Estimate, seeds_for
from ablations.analysis.factors import Term, controlled, label, with_controls, without
from ablations.analysis.responses import BY_NAME, COMPARED, Response
from ablations.study import schema
from core.errors import InputError, choose

if TYPE_CHECKING:
    from ablations.analysis.comparisons import Comparisons

COLUMNS = ["optimization", "response", "estimate", "low", "high", "margin", "verdict", "seeds"]
MARGINS = {"accuracy": 0.5, "time": 2.0, "memory": 2.0}  # points, %, %
LARGEST = 1000  # margin
SHORT = {"accuracy": "accuracy", "step time": "time", "peak memory": "memory"}
AGAINST_CONTROL = " against control"
NOT_TIMED = "not timed"
UNDECIDED = "undecided"


def read_margins(given: Mapping[str, Any]) -> dict[str, float]:
    """MARGINS with these changed (accuracy in points, time and memory in percent); InputError for an unknown response
    or a value that is no positive number or a larger one than LARGEST."""
    out = dict(MARGINS)
    for name, value in given.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = nan
        if not 0 < number <= LARGEST:
            raise InputError(
                f"margin {name}={value} is no positive number up to {LARGEST:,}; write for example accuracy=0.5"
            )
        out[choose("margin of", name, MARGINS)] = number
    return out


def read_decisions(folder: Path) -> tuple[dict[str, float], int]:
    """Margins, and how often a run looks at most before it stops: of margins.json in a study's folder, as {"margins":
    {"accuracy": 0.5}, "looks": 8}; the defaults and 1 without it. Damaged if it is something else."""
    path = folder / "margins.json"
    if not os.path.lexists(path):
        return dict(MARGINS), 1
    found = schema.read(path, schema.MarginsFile)
    try:
        return read_margins(found["margins"]), found["looks"]
    except InputError as error:
        raise schema.Damaged(f"'{path}' cannot be read ({error})") from error


def verdicts(comparisons: "Comparisons") -> pd.DataFrame:
    """A row an optimization, or control, and response, and for each with a control one of the difference from this:
    COLUMNS, estimate, low, high and margin as they are told (points, %), seeds (of step time rounds, of peak memory 1);
    and `within` (told from zero, by less than the margin), `more` (seeds or rounds that would decide; nan: none or no
    need), `failed`, `cells` (how many of its cells failed, of how many), `by_failures` (whether these, and not the
    interval, make the verdict). Intervals hold together over the
    optimizations, over the controls, and over the differences."""
    rows: list[dict[str, Any]] = []
    pairs: dict[str, list[tuple[str, str]]] = {}
    for name, arm, other in controlled(comparisons.study.arms):
        pairs.setdefault(name, []).append((arm, other))
    beside = {} if comparisons.baseline_differs else with_controls(comparisons.study.arms)
    for name in COMPARED:
        effects = comparisons.effects[name]
        found = {effect.term: effect.estimate for effect in effects.of_order(1)}
        every = [(term, found.get(term), len(found)) for term in comparisons.optimizations]
        means = differences(comparisons.tables[name], beside.values(), BY_NAME[name].estimator) if beside else []
        for term, e, of in every + [(*mean, len(beside)) for mean in zip(beside, means, strict=True)]:
            lost = _lost(comparisons, term)
            row = _row(comparisons, label(term), BY_NAME[name], e, of)
            if name == "accuracy":
                row |= _failing(row["verdict"], lost, len(every), comparisons.confidence)
            rows.append(row | {"failed": lost["failed"], "cells": lost["cells"]})
    for name in COMPARED if pairs else ():
        groups = differences(comparisons.tables[name], pairs.values(), BY_NAME[name].estimator)
        there = sum(e is not None for e in groups)
        for optimization, e in zip(pairs, groups, strict=True):
            row = _row(comparisons, optimization, BY_NAME[name], e, there)
            rows.append(row | {"response": name + AGAINST_CONTROL})
    return pd.DataFrame(rows, columns=[*COLUMNS, "within", "more", "failed", "cells", "by_failures"])


def judge(low: float, high: float, margin: float) -> str:
    """The verdict of an interval of a difference in which more is better; margin in its unit."""
    if isnan(low):
        return UNDECIDED
    if -margin < low and high < margin:
        return "no worse"
    if low > 0 or high < 0:
        return "better" if low > 0 else "worse"
    return "no worse" if low > -margin else UNDECIDED


def decided(comparisons: "Comparisons", margins: Mapping[str, float]) -> bool:
    """Whether every optimization's accuracy has a verdict at this margin, so that training may stop.

    Valid at each of at most `comparisons.looks` looks (one after every seed from the second to the last allowed): an
    interval of each look has confidence 1 - 0.05 / looks, an equal share of the error for every look (Bonferroni), so
    that over all looks, whenever training stops, the verdicts are wrong in at most 5 % of studies. (Pocock's bounds are
    a little narrower, but are of normal statistics with known variances.) Raises InputError for other responses: seeds
    tell nothing of them.
    """
    if set(margins) != {"accuracy"}:
        raise InputError(f"--until {' '.join(f'{k}={v}' for k, v in margins.items())} cannot be; write accuracy=0.5")
    margin = read_margins(margins)["accuracy"] / 100
    found = comparisons.effects["accuracy"].of_order(1)
    ends = [effect.estimate.interval(comparisons.confidence, len(found)) for effect in found]
    return all(judge(low, high, margin) != UNDECIDED for low, high in ends)


def _row(
    comparisons: "Comparisons", optimization: str, response: Response, found: Estimate | None, of: int
) -> dict[str, Any]:
    margin = comparisons.margins[SHORT[response.name]]
    row = {"optimization": optimization, "response": response.name, "margin": margin, "seeds": 0, "by_failures": False}
    if found is None:
        return row | {"verdict": NOT_TIMED if response.name == "step time" else UNDECIDED, "within": False}
    inner = margin / 100 if response.name == "accuracy" else log1p(margin / 100)
    low, high = found.interval(comparisons.confidence, of)
    ends = (low, high) if response.better > 0 else (-high, -low)
    verdict = judge(*ends, inner)
    lead = response.better * found.value
    needed = (
        seeds_for(max(abs(lead), lead + inner), found, of, comparisons.confidence) if verdict == UNDECIDED else None
    )
    return row | {
        "estimate": response.shown(found.value),
        "low": response.shown(low),
        "high": response.shown(high),
        "verdict": verdict,
        "seeds": found.seeds,
        "within": verdict == "no worse" and (low > 0 or high < 0),
        "more": nan if needed is None else max(needed - found.seeds, 1),
    }


def _lost(comparisons: "Comparisons", term: Term) -> dict[str, int]:
    """Of an optimization's cells how many there are and how many failed; and of those whose cell without it is there
    too, how many failed with it alone, and without it alone."""
    study = comparisons.study
    outcomes = {cell.key: False for cell in study.cells} | {(f["arm"], f["seed"]): True for f in study.failed}
    pairs = without(term, dict.fromkeys(arm for arm, _ in outcomes))
    mine = {key: bad for key, bad in outcomes.items() if key[0] in pairs}
    both = [(bad, outcomes[key]) for (arm, seed), bad in mine.items() if (key := (pairs[arm] or "", seed)) in outcomes]
    alone = {"with": both.count((True, False)), "without": both.count((False, True))}
    return {"cells": len(mine), "failed": sum(mine.values()), **alone}


def _failing(verdict: str, lost: Mapping[str, int], of: int, confidence: float) -> dict[str, Any]:
    """A cell that failed under an optimization and not without it is an outcome: those that finished do not show it to
    be better or no worse, however many more there are; by McNemar's test it may be worse."""
    if not lost["with"] or verdict == "worse":
        return {}
    test = stats.binomtest(lost["with"], lost["with"] + lost["without"], alternative="greater")
    told = "worse" if test.pvalue < (1 - confidence) / of else UNDECIDED
    return {"verdict": told, "by_failures": True, "within": False, "more": nan}


def of_optimization(frame: pd.DataFrame) -> Iterable[tuple[str, dict[str, dict[str, Any]]]]:
    """Each optimization, and its rows by response."""
    for name, rows in frame.groupby("optimization", sort=False):
        yield str(name), {row["response"]: row for row in rows.to_dict("records")}


def untimed(comparisons: "Comparisons") -> Sequence[str]:
    """Arms of the study that the timing pass has not."""
    return [arm for arm in comparisons.study.arms if comparisons.timing and arm not in comparisons.timing.arms]
