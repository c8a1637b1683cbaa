"""What a study says, in words: each sentence from its numbers."""

from collections.abc import Iterable, Mapping
from math import isnan
from pathlib import Path
from typing import Any

from ablations.analysis import planning
from ablations.analysis.comparisons import Comparisons
from ablations.analysis.factors import control_of, label
from ablations.analysis.responses import BY_NAME, COMPARED
from ablations.analysis.verdicts import AGAINST_CONTROL, NOT_TIMED, SHORT, UNDECIDED, of_optimization, untimed
from ablations.reporting.formatting import UNITS, interval, listed, signed, verbatim, written
from ablations.study.arms import AGAIN, BASELINE
from ablations.study.identity import differences
from core.errors import InputError

_WHERE = {"accuracy": "accuracy counts", "step time": "time is short", "peak memory": "memory is short"}
_MANY = 50  # seeds: more than anyone trains for a verdict
Rows = Mapping[str, Mapping[Any, Any]]  # an optimization's verdicts by response


def pays(comparisons: Comparisons) -> list[str]:
    """A sentence an optimization: when it pays."""
    images = comparisons.study.cells[0].correct.shape[1]
    many = "--every-arm" if comparisons.broken else "--seeds 3"
    return [_pays(name, rows, images, many) for name, rows in of_optimization(comparisons.verdicts)]


def _pays(optimization: str, rows: Rows, images: int, many: str) -> str:
    """images: how many are held out at a seed. many: the option that gives an arm several seeds."""
    own = {name: rows[name] for name in COMPARED if name in rows}
    gains, costs, same = (_listed(own, verdict) for verdict in ("better", "worse", "no worse"))
    left = [_open(row, images, many) for row in own.values() if row["verdict"] in (UNDECIDED, NOT_TIMED)]
    if gains and _beaten(own, rows):
        price = f" for {costs}" if costs else ""
        said = f"does not pay here: {gains}{price}, and its control `{control_of(optimization)}` gives more"
    elif gains and costs:
        where = " and ".join(_WHERE[name] for name, row in own.items() if row["verdict"] == "better")
        said = f"pays where {where}: {gains} for {costs}"
    elif gains:
        said = f"gains {gains}" if left else f"pays: {gains}"
        said += f"; {same} no worse" if same else ""
    elif costs:
        said = f"does not pay here: costs {costs}" + ("" if left else " and gains nothing beyond the margins")
    else:
        said = f"no worse in {same}" if left and same else "undecided" if left else "changes nothing beyond the margins"
    accuracy = own["accuracy"]
    told = accuracy["by_failures"] and accuracy["verdict"] == "worse"
    left += [_failed(accuracy)] if accuracy["failed"] and not told else []
    return f"`{optimization}`: {'; '.join([said, *left])}.{_against_control(optimization, rows)}"


def _beaten(own: Rows, rows: Rows) -> bool:
    """Whether the control gains more of all that an optimization gains, and is better in nothing less."""
    against = {name: rows[name + AGAINST_CONTROL]["verdict"] for name in own if name + AGAINST_CONTROL in rows}
    gained = [against.get(name) for name, row in own.items() if row["verdict"] == "better"]
    return set(gained) == {"worse"} and "better" not in against.values()


def _listed(rows: Rows, verdict: str) -> str:
    """`time (−10.1 %) and memory (−20.0 %)`, of the responses with this verdict."""
    texts = []
    for name, row in rows.items():
        if row["verdict"] == verdict:
            response = BY_NAME[name.removesuffix(AGAINST_CONTROL)]
            value = f"{written(response, row['estimate'])} {UNITS[response.name]}"
            texts.append(f"{SHORT[response.name]} ({_failed(row) if row['by_failures'] else value})")
    return " and ".join(filter(None, [", ".join(texts[:-1]), *texts[-1:]]))


def _failed(row: Mapping[Any, Any]) -> str:
    return f"{row['failed']:.0f} of its {row['cells']:.0f} cells failed"


def _open(row: Mapping[Any, Any], images: int, many: str) -> str:
    """Why a verdict is open, and what would close it."""
    name = SHORT[row["response"]]
    if row["verdict"] == NOT_TIMED:
        return "time not timed"
    if row["by_failures"]:
        return f"{name} undecided: cells failed that finish without it"
    if isnan(row["low"]):
        return f"{name}: no interval: {many}" if row["seeds"] == 1 else f"{name}: these arms do not determine it"
    step_time = row["response"] == "step time"
    if isnan(row["more"]):
        return f"{name} undecided" + ("" if step_time else f": {images:,} validation images are too few for any seeds")
    needed = f"about {row['more']:,.0f} more {'rounds' if step_time else 'seeds'}"
    if row["more"] > _MANY and not step_time:
        return f"{name} cannot be decided on this data: {images:,} validation images at a seed would take {needed}"
    return f"{name} undecided: {needed} would tell"


def _against_control(optimization: str, rows: Rows) -> str:
    """What is left beside the simpler means to the same end."""
    own = {name: row for name, row in rows.items() if name.endswith(AGAINST_CONTROL)}
    if not own:
        return ""
    control, gains, costs = control_of(optimization), _listed(own, "better"), _listed(own, "worse")
    said = [f"it gains {gains}"] * bool(gains) + [f"it costs {costs}"] * bool(costs)
    open_ = [SHORT[n.removesuffix(AGAINST_CONTROL)] for n, r in own.items() if r["verdict"] in (UNDECIDED, NOT_TIMED)]
    said += [f"{' and '.join(open_)} undecided"] * bool(open_)
    if not gains and not open_:
        said.append("the control does the same by simpler means")
    return f" Against its control `{control}`: {'; '.join(said)}."


def sentences(comparisons: Comparisons) -> list[str]:
    """What the verdicts rest on, a sentence or two each."""
    study, compared = comparisons.study, comparisons.compared
    seeds, images = len(study.seeds), study.cells[0].correct.shape[1]
    arms = len([arm for arm in study.arms if arm != AGAIN])
    out = [
        f"{_count(arms, 'arm')}, {_count(seeds, 'seed')}, {_count(study.configuration['epochs'], 'epoch')} on "
        f"{study.configuration['data']}, {images:,} validation images: {_count(len(study.cells), 'cell')} finished, "
        f"{len(study.failed)} failed{_spared(comparisons)}."
    ]
    if compared:
        units = {SHORT[name]: f"{comparisons.margins[SHORT[name]]:g} {UNITS[name]}" for name in COMPARED}
        margins = ", ".join(f"{name} {margin}" for name, margin in units.items())
        joined = " (the strictest of the joined studies)" * comparisons.strictest
        out.append(
            f"Margins{joined}: {margins}; a column's intervals hold together at {sure(comparisons)}, those against a "
            "control too."
        )
    if BASELINE not in study.arms:
        out.append("There is no baseline: nothing to compare with. `--arms baseline`, in the same folder, adds it.")
    elif not compared:
        out.append("There is one arm: nothing to compare. `--arms all`, in the same folder, adds the others.")
    if apart := [arm for arm in compared if comparisons.against("accuracy", arm) is None]:
        out.append(f"Not compared, for they share no seed with the baseline: {listed(apart)}.")
    if seeds == 1 and compared:
        out.append("**One seed: accuracy has no interval.** `--seeds 3` gives one.")
    out += [f"**Left out:** {verbatim(text)}." for text in comparisons.damaged]
    out += [f"**Not made by the same as the other cells:** {text}." for text in study.changes]
    return [*out, *_timing(comparisons), *_repeatability(comparisons), *_exactness(comparisons), *_holes(comparisons)]


def sure(comparisons: Comparisons) -> str:
    """The confidence of every interval: `95 %`, or of each of several looks more."""
    return f"{100 * comparisons.confidence:.3g} %"


def _spared(comparisons: Comparisons) -> str:
    """How many cells exact arms need not have."""
    study, twins = comparisons.study, {one.arm for one in {*comparisons.identities} - {*comparisons.broken}}
    many = len(twins) * len(study.seeds) - sum(cell.key[0] in twins for cell in study.cells)
    return f"; {many} more are known from exact twins" if many > 0 else ""


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def _timing(comparisons: Comparisons) -> Iterable[str]:
    timing = comparisons.timing
    if timing is None:
        if len(comparisons.study.folders) > 1:
            yield "Step times are in each study's own report: those of different hours are not compared."
        elif comparisons.compared:
            yield "Not timed, so that nothing is said of step time: `run.py --timing-only`, with the same options."
        return
    again = comparisons.against("step time", AGAIN)
    noise = ""
    if again:
        low, high = (signed(BY_NAME["step time"], end) for end in again.interval(comparisons.confidence))
        noise = f"; the baseline against itself [{low}, {high}] %"
    yield f"Step time: {len(timing.rounds)} rounds of all arms in shuffled order{noise}."
    if not timing.quiet:
        yield "**The machine was not quiet** while it was timed: intervals of step time are wide."
    if changed := differences(comparisons.study.identity, timing.identity):
        yield f"**Timed under others than the cells were made by:** {', '.join(changed)}; `run.py --timing-only`."
    if arms := untimed(comparisons):
        told = (f"`{arm}`" + (f" ({verbatim(why)})" if (why := timing.failed.get(arm)) else "") for arm in arms)
        yield f"Arms that were not timed: {', '.join(told)}."


def _repeatability(comparisons: Comparisons) -> Iterable[str]:
    """The baseline trained against itself."""
    frame = comparisons.against_baseline
    rows = [] if frame.empty else frame[(frame["arm"] == AGAIN) & (frame["response"] == "accuracy")].to_dict("records")
    for row in rows:
        yield f"Repeatability: the baseline trained a second time with the same seeds: accuracy {interval(row)} points."


def _exactness(comparisons: Comparisons) -> Iterable[str]:
    """That exact arms predict what their twins predict, so that these stand for them; or which do not."""
    found = comparisons.identities
    for one in comparisons.broken:
        yield (
            f"**`{one.arm}` breaks its contract (exact):** at seed {one.seed} its accuracy is "
            f"{signed(BY_NAME['accuracy'], one.lead)} points from that of `{one.twin}`, which therefore does not stand "
            "for it; `--every-arm` trains it at every seed."
        )
    if found:
        worst = max(found, key=lambda identity: identity.differ)
        same = sum(identity.differ == 0 for identity in found)
        pair = f"`{worst.arm}` and `{worst.twin}`"
        odd = f"; at most {worst.differ} of {worst.images:,} differ ({pair})" * (same < len(found))
        yield (
            "Arms take their accuracy from the arm without their exact optimizations. What is right and wrong at the "
            f"first seed is identical for {same} of {len(found)} such arms{odd}."
        )


def _holes(comparisons: Comparisons) -> Iterable[str]:
    """Cells that are not there, and effects that cannot be told without them."""
    study, found = comparisons.study, comparisons.effects["accuracy"]
    if holes := comparisons.holes:
        shown = ", ".join(f"`{arm}` seed {seed}" for arm, seed in holes[:5])
        more = f" and {len(holes) - 5} more" if len(holes) > 5 else ""
        yield f"Not there, and fitted without: {shown}{more}."
    if study.failed:
        yield "Failed cells count against an optimization where the cell without it finished."
    if comparisons.baseline_differs and BASELINE in study.arms:
        yield "The baseline is another model than the other arms: effects and interactions leave it out."
    if found.design.apart and comparisons.compared:
        pairs = [label(pair) for pair in found.design.apart]
        text = ", ".join(pairs[:5]) + (f" and {len(pairs) - 5} more" if len(pairs) > 5 else "")
        yield f"These arms do not tell apart the interactions {text}; effects are fitted as if there were none."
    if comparisons.compared:
        aliased = [pairs for pairs in found.design.aliases if set(pairs) <= set(found.lost)]
        for terms in aliased:
            yield f"Aliases, which these arms do not tell from each other: {', '.join(map(label, terms))}."
        if lost := set(found.lost).difference(*aliased):
            yield f"These arms do not determine the effects {', '.join(label(t) for t in found.lost if t in lost)}."


def seeds(out: Path, margin: float, optimizations: int) -> str:
    """How many seeds a verdict on accuracy takes, from results where there are any."""
    found, why = {}, "none is trained yet that tells it"
    if any(out.glob("cells/*/seed*/result.json")):
        try:
            found = planning.from_results(out, margin)
        except InputError as error:
            why = str(error)
    if found:
        told = (f"{name} {'no number' if isnan(n) else f'{n:.0f}'}" for name, n in found.items())
        return f"Seeds for a verdict on accuracy at ±{margin:g} points, from those trained: {', '.join(told)}."
    told = (f"{n:,} if it is {d:g}" for d, n in planning.by_deviation(margin, optimizations).items() if n)
    return (
        f"Seeds for a verdict on accuracy at ±{margin:g} points, by the deviation of an optimization's effect from "
        f"seed to seed ({why}): {', '.join(told)}."
    )
