"""What the cells of a study say of its arms, as tables: effects, differences, and what stands beside them.

A row of differences has `response` and the columns of `Estimate.described`: the intervals of a response that hold
together are those of one table.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Any

import numpy as np
import pandas as pd

from ablations.analysis.effects import Effects, difference, fit
from ablations.analysis.estimates import Estimate
from ablations.analysis.factors import controlled, label, levels
from ablations.analysis.responses import BY_NAME, COMPARED, Table, tables
from ablations.study.arms import AGAIN, BASELINE
from ablations.study.reading import Study

Pair = tuple[dict[str, Any], str, str]  # how a row is called, an arm, and the one that it is compared with


@dataclass(frozen=True)
class Comparisons:
    """A study's arms against one another."""

    study: Study

    @cached_property
    def tables(self) -> dict[str, Table]:
        """Of each response: (arm, seed) -> values."""
        return tables(self.study)

    @property
    def baseline_differs(self) -> bool:
        """Whether the baseline is another model than the other arms, which the factorial must then leave out."""
        return any(self.study.configuration.get(f"baseline_{what}") is not None for what in ("width", "heads"))

    @property
    def compared(self) -> list[str]:
        """Arms that stand beside a baseline."""
        arms = list(self.study.arms)
        return [arm for arm in arms if arm not in (BASELINE, AGAIN)] if BASELINE in arms else []

    @cached_property
    def cells(self) -> pd.DataFrame:
        """A row a cell: its result's numbers and words, and under each response's name the response."""
        flat = [{k: v for k, v in result.items() if not isinstance(v, dict)} for result in self.study.results]
        means = {name: [table[cell.key].mean() for cell in self.study.cells] for name, table in self.tables.items()}
        return pd.DataFrame(flat).assign(**means)

    def mean(self, response: str, arm: str) -> float:
        """The mean of a response over an arm's seeds."""
        return float(self.cells.loc[self.cells["arm"] == arm, response].mean())

    @cached_property
    def effects(self) -> dict[str, Effects]:
        """Main effects and interactions of each response."""
        without = [BASELINE] if self.baseline_differs else []
        return {name: fit(table, without) for name, table in self.tables.items()}

    @cached_property
    def effect_table(self) -> pd.DataFrame:
        """All effects: response, effect, order (1: main, 2: interaction). Step time and peak memory are differences of
        natural logarithms."""
        rows = [
            {"response": name, "effect": label(term), "order": len(term), **found.described(len(these.effects))}
            for name, these in self.effects.items()
            for term, found in these.effects
        ]
        return pd.DataFrame(rows)

    def against(self, response: str, arm: str, other: str = BASELINE) -> Estimate | None:
        """An arm minus another, within seeds."""
        return difference(self.tables[response], arm, other)

    def _differences(self, pairs: Iterable[Pair]) -> pd.DataFrame:
        pairs = list(pairs)
        rows = [
            {**called, "response": name, **found.described(len(pairs))}
            for called, arm, other in pairs
            for name in COMPARED
            if (found := self.against(name, arm, other))
        ]
        return pd.DataFrame(rows)

    @cached_property
    def against_baseline(self) -> pd.DataFrame:
        """Every arm minus the baseline: arm."""
        again = [AGAIN] if {BASELINE, AGAIN} <= set(self.study.arms) else []
        return self._differences(({"arm": arm}, arm, BASELINE) for arm in [*again, *self.compared])

    @cached_property
    def against_controls(self) -> pd.DataFrame:
        """Every arm minus itself with an optimization's control in place of the optimization: optimization, arm,
        control."""
        return self._differences(
            ({"optimization": name, "arm": arm, "control": other}, arm, other)
            for name, arm, other in controlled(self.study.arms)
        )

    @cached_property
    def taken_out(self) -> pd.DataFrame:
        """Everything without an optimization minus everything: optimization, everything."""
        design = self.effects["step time"].design
        named = {frozenset(levels(arm).items()): arm for arm in self.study.arms if arm != AGAIN}
        pairs = []
        for term in design.mains:
            ((factor, level),) = term
            rest = {f: names[1] for f, names in design.factors.items() if f != factor}
            everything, without = (named.get(frozenset(s.items())) for s in (rest | {factor: level}, rest))
            if rest and everything and without:
                pairs.append(({"optimization": label(term), "everything": everything}, without, everything))
        return self._differences(pairs)

    def at_equal_memory(self, arm: str) -> int:
        """The batch that an arm could train on within the baseline's predicted peak memory."""
        mine, base = (self.study.arms[name][0].result for name in (arm, BASELINE))
        spare = base["predicted_peak_bytes"] - mine["predicted_peak_bytes"]
        return int(mine["batch_size"] + spare // mine["bytes_per_image"])

    @cached_property
    def target(self) -> float:
        """An accuracy that the baseline reached at every seed."""
        cells = self.study.arms.get(BASELINE) or self.study.cells
        return min(cell.result["best_val_accuracy"] for cell in cells)

    def to_target(self, arm: str, target: float) -> tuple[float, int]:
        """Mean training seconds until the first epoch at the target, over the seeds that reach it, and their number."""
        first = [
            next((row["seconds"] for row in cell.rows if row["val/accuracy"] >= target), inf)
            for cell in self.study.arms[arm]
        ]
        reached = [seconds for seconds in first if seconds < inf]
        return (float(np.mean(reached)) if reached else inf), len(reached)

    def front(self, *responses: str) -> list[str]:
        """Arms that no other arm beats in all of these responses at once (means over seeds)."""
        signs = [BY_NAME[name].better for name in responses]
        means = self.cells.loc[self.cells["arm"] != AGAIN].groupby("arm")[list(responses)].mean() * signs
        beaten = {arm for arm, p in means.iterrows() if ((means >= p).all(axis=1) & (means != p).any(axis=1)).any()}
        return [arm for arm in self.study.arms if arm in means.index and arm not in beaten]

    def curves(self, most: int = 8) -> list[str]:
        """Arms whose learning curves say most: the baseline, each optimization alone, the best of all."""
        arms = [arm for arm in self.study.arms if arm != AGAIN]
        alone = [arm for arm in arms if len(levels(arm)) <= 1]
        best = max(arms, key=lambda arm: self.mean("accuracy", arm))
        return list(dict.fromkeys([*alone[: most - (best not in alone[:most])], best]))
