"""What the cells of a study say of its arms, as tables: verdicts, effects, differences, and what stands beside them.

A row of differences has `response` and the columns of `Estimate.described`: the intervals of a response that hold
together are those of one table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from pathlib import Path

import numpy as np
import pandas as pd

from ablations.analysis import timing as timing_pass
from ablations.analysis import verdicts as judging
from ablations.analysis.design import Design
from ablations.analysis.effects import Effects, differences, fit
from ablations.analysis.estimates import CONFIDENCE, Estimate, Values
from ablations.analysis.exactness import Identity, broken, identities
from ablations.analysis.factors import Term, in_factorial, label, levels
from ablations.analysis.responses import BY_NAME, COMPARED, RESPONSES, Table, tables, twins_of
from ablations.analysis.timing import Timing
from ablations.study.arms import AGAIN, BASELINE
from ablations.study.reading import Study, read
from ablations.study.schema import Damaged


@dataclass(frozen=True)
class Comparisons:
    """A study's arms against one another.

    margins: of MARGINS' responses. looks: at how many numbers of seeds the study might have stopped (see
    `verdicts.decided`). strictest: whether joined studies have different ones, and these are the strictest. timing: the
    timing pass, if there is one. unread: files beside the cells that could not be read, and why.
    """

    study: Study
    margins: Mapping[str, float] = field(default_factory=lambda: dict(judging.MARGINS))
    looks: int = 1
    strictest: bool = False
    timing: Timing | None = None
    unread: tuple[str, ...] = ()

    @property
    def confidence(self) -> float:
        """Of every interval: over all looks 95 %."""
        return 1 - (1 - CONFIDENCE) / self.looks

    @property
    def damaged(self) -> tuple[str, ...]:
        """What of the study could not be read, and why: all is said without it."""
        return self.study.damaged + self.unread

    @cached_property
    def twins(self) -> dict[str, str]:
        """The arm whose accuracy is taken for an arm's own: itself, where the twin's is another."""
        return twins_of(self.study, self.baseline_differs) | {one.arm: one.arm for one in self.broken}

    @cached_property
    def tables(self) -> dict[str, Table]:
        """Of each response: (arm, seed) -> values."""
        return tables(self.study, self.timing, self.twins)

    @property
    def baseline_differs(self) -> bool:
        """Whether the baseline is another model than the other arms, which the factorial must then leave out."""
        return any(self.study.configuration.get(f"baseline_{what}") is not None for what in ("width", "heads"))

    @property
    def compared(self) -> list[str]:
        """Arms that stand beside a baseline."""
        arms = list(self.study.arms)
        return [arm for arm in arms if arm not in (BASELINE, AGAIN)] if BASELINE in arms else []

    @property
    def optimizations(self) -> list[Term]:
        """The main effects of the study's arms, those that never finished included."""
        arms = {*self.study.arms, *(failure["arm"] for failure in self.study.failed)}
        return Design(tuple(filter(in_factorial, arms))).mains

    @cached_property
    def cells(self) -> pd.DataFrame:
        """A row a cell: its result's numbers and words, and under each response's name the response (step time: the
        cell's own)."""
        flat = [{k: v for k, v in result.items() if not isinstance(v, dict)} for result in self.study.results]
        means = {r.name: [r.values(cell).mean() for cell in self.study.cells] for r in RESPONSES}
        return pd.DataFrame(flat).assign(**means)

    @cached_property
    def means(self) -> pd.DataFrame:
        """Of each arm (index, in the study's order) the mean of each response: accuracy and loss of its twin, step time
        as a logarithm, in the timing pass (nan without one; only differences mean something)."""
        columns = {
            name: pd.Series({key: float(np.nanmean(y)) for key, y in table.items()}, dtype=float)
            .groupby(level=0)
            .mean()
            for name, table in self.tables.items()
            if table
        }
        return pd.DataFrame(columns, index=list(self.study.arms), columns=list(BY_NAME)).astype(float)

    @cached_property
    def effects(self) -> dict[str, Effects]:
        """Main effects and interactions of each response."""
        without = [BASELINE] if self.baseline_differs else []
        return {name: fit(table, without, BY_NAME[name].estimator) for name, table in self.tables.items()}

    @cached_property
    def effect_table(self) -> pd.DataFrame:
        """All effects: response, effect, order (1: main, 2: interaction; the intervals of an order hold together). Step
        time and peak memory are differences of natural logarithms."""
        rows = [
            {
                "response": name,
                "effect": label(term),
                "order": len(term),
                **found.described(len(these.of_order(len(term))), self.confidence),
            }
            for name, these in self.effects.items()
            for term, found in these.effects
        ]
        return pd.DataFrame(rows)

    @cached_property
    def verdicts(self) -> pd.DataFrame:
        """See `verdicts.verdicts`."""
        return judging.verdicts(self)

    def against(self, response: str, arm: str, other: str = BASELINE) -> Estimate | None:
        """An arm minus another, within seeds (of step time: rounds)."""
        return differences(self.tables[response], [[(arm, other)]], BY_NAME[response].estimator)[0]

    @cached_property
    def against_baseline(self) -> pd.DataFrame:
        """Every arm minus the baseline: arm."""
        again = [AGAIN] if {BASELINE, AGAIN} <= set(self.study.arms) else []
        arms = [*again, *self.compared]
        rows = []
        for name in COMPARED:
            found = differences(self.tables[name], [[(arm, BASELINE)] for arm in arms], BY_NAME[name].estimator)
            described = [e.described(len(arms), self.confidence) if e else None for e in found]
            rows += [{"arm": arm, "response": name, **d} for arm, d in zip(arms, described, strict=True) if d]
        return pd.DataFrame(rows)

    @cached_property
    def times(self) -> pd.DataFrame:
        """Of the timing pass by arm (index): `at`, the step time over the baseline's, and its interval's ends, `low`
        and `high`; empty where there is none."""
        frame = self.against_baseline
        if self.timing is None or frame.empty:
            return pd.DataFrame()
        rows = frame[frame["response"] == "step time"].set_index("arm")[["estimate", "low", "high"]]
        found = np.exp(rows.rename(columns={"estimate": "at"}))
        found.loc[BASELINE] = 1.0
        return found

    @cached_property
    def identities(self) -> list[Identity]:
        """Every exact arm beside its twin, at the first seed that has both."""
        return identities(self.study, twins_of(self.study, self.baseline_differs))

    @cached_property
    def broken(self) -> list[Identity]:
        """Those of them that are not what their twin is: their contract does not hold."""
        return broken(self.identities, self.margins["accuracy"] / 100)

    @property
    def holes(self) -> list[tuple[str, int]]:
        """Cells that neither finished nor failed and that no twin stands for."""
        known = {cell.key for cell in self.study.cells} | {(f["arm"], f["seed"]) for f in self.study.failed}
        return [
            (arm, seed)
            for arm in self.study.arms
            for seed in self.study.seeds
            if (arm, seed) not in known and (BASELINE if arm == AGAIN else self.twins[arm], seed) not in known
        ]

    @cached_property
    def target(self) -> float:
        """An accuracy that the baseline reached at every seed."""
        cells = self.study.arms.get(BASELINE) or self.study.cells
        return min(cell.result["best_val_accuracy"] for cell in cells)

    def to_target(self, arm: str, target: float) -> float:
        """Median over seeds of the training seconds until the first epoch at the target; inf if at least half of the
        seeds did not reach it (they count as later than all others: censored, not left out)."""
        first = [
            next((row["seconds"] for row in cell.rows if row["val/accuracy"] >= target), inf)
            for cell in self.study.arms[arm]
        ]
        middle = np.sort(first)[[(len(first) - 1) // 2, len(first) // 2]]
        return float(middle.mean())

    def front(self, *responses: str) -> list[str]:
        """Arms that no other arm beats in all of these responses at once (`means`); none where one was not measured."""
        signs = [BY_NAME[name].better for name in responses]
        means = (self.means.drop(index=AGAIN, errors="ignore")[list(responses)] * signs).dropna()
        return [a for a, p in means.iterrows() if not ((means >= p).all(axis=1) & (means != p).any(axis=1)).any()]

    def curve(self, arm: str, key: str) -> tuple[Values, Values]:
        """By epoch: an arm's mean over seeds of what its rows have under `key`, and the deviation (0 for one seed)."""
        values = np.array([[row[key] for row in cell.rows] for cell in self.study.arms[arm]])
        return values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])

    def curves(self, most: int = 8) -> list[str]:
        """Arms whose learning curves say most: the baseline, each optimization alone, the highest mean."""
        arms = [arm for arm in self.study.arms if arm != AGAIN]
        alone = [arm for arm in arms if len(levels(arm)) <= 1]
        highest = str(self.means.loc[arms, "accuracy"].idxmax())
        return list(dict.fromkeys([*alone[: most - (highest not in alone[:most])], highest]))


def compare(folders: Sequence[Path]) -> Comparisons:
    """The study in this folder, or several joined, with its own margins (margins.json): of several the smallest, and
    the most looks. Raises InputError for what `reading.read` refuses."""
    study = read(folders)
    decisions: list[tuple[dict[str, float], int]] = []
    timing: Timing | None = None
    unread: list[str] = []
    for folder in folders:
        try:
            decisions.append(judging.read_decisions(folder))
        except Damaged as error:
            unread.append(str(error))
            decisions.append((dict(judging.MARGINS), 1))
    try:
        timing = timing_pass.read(folders)
    except Damaged as error:
        unread.append(str(error))
    margins = {name: min(own[name] for own, _ in decisions) for name in judging.MARGINS}
    strictest = any(decision != decisions[0] for decision in decisions)
    return Comparisons(study, margins, max(looks for _, looks in decisions), strictest, timing, tuple(unread))
