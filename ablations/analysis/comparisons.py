"""What the cells of a study say of its arms: responses, differences from the baseline, equal time and memory."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import exp, inf, log
from typing import NamedTuple

import numpy as np

from ablations.analysis.effects import Effects, Noise, Table, difference, effects, label, levels, noise
from ablations.analysis.estimates import Estimate, Values
from ablations.study.arms import AGAIN, BASELINE
from ablations.study.reading import Cell, Study
from core.transforms.registry import REGISTRY


class Response(NamedTuple):
    """A quantity that arms are compared in. values: of a cell, [images] or [1]. shown: a difference in `unit`.

    better: 1 if more is better, else -1. random: whether equal runs differ in it.
    """

    name: str
    unit: str
    values: Callable[[Cell], Values]
    shown: Callable[[float], float]
    form: str
    better: int
    random: bool = True

    def text(self, value: float) -> str:
        """A difference with its sign: `+1.25`; from a thousand on, which only an interval's end can be, `>+999`."""
        if self.shown(value) >= 1000:
            return ">+999"
        written = format(self.shown(value), self.form)
        return written.replace("-", "−") if self.visible(value) else written.lstrip("+-")

    def visible(self, value: float) -> bool:
        """Whether a difference is not zero as it is written."""
        return any(digit in format(self.shown(value), self.form) for digit in "123456789")


def _number(key: str, of: Callable[[float], float] = float) -> Callable[[Cell], Values]:
    return lambda cell: np.array([of(cell.result[key])])


def _percent(ratio: float) -> float:
    return 100 * (exp(ratio) - 1)


RESPONSES = (
    Response("accuracy", "points", lambda cell: cell.correct[-1].astype(float), lambda x: 100 * x, "+.2f", 1),
    Response("loss", "", _number("final_val_loss"), float, "+.4f", -1),
    Response("step time", "%", _number("step_ms_median", log), _percent, "+.1f", -1),
    Response("peak memory", "%", _number("peak_bytes", log), _percent, "+.1f", -1, random=False),
)
COMPARED = ("accuracy", "step time", "peak memory")  # in words, and between single arms
BY_NAME = {response.name: response for response in RESPONSES}


class Swap(NamedTuple):
    """What a level does when it is added to the baseline, and when it is taken out of everything together."""

    level: str
    added: Estimate | None
    everything: str | None
    removed: Estimate | None


@dataclass(frozen=True)
class Views:
    """A study's conclusions, response by response."""

    study: Study

    @cached_property
    def tables(self) -> dict[str, Table]:
        """Of each response: (arm, seed) -> values."""
        return {r.name: {cell.key: r.values(cell) for cell in self.study.cells} for r in RESPONSES}

    @property
    def apart(self) -> list[str]:
        """Arms that the factorial leaves out: a baseline that is another model than the other arms."""
        return [BASELINE] if self.study.configuration.get("baseline_width") is not None else []

    @cached_property
    def effects(self) -> dict[str, Effects]:
        """Main effects and interactions of each response."""
        return {name: effects(table, self.noise[name], self.apart) for name, table in self.tables.items()}

    @cached_property
    def noise(self) -> dict[str, Noise | None]:
        """With one seed, the noise of a cell of each response, by Lenth's method."""
        if len(self.study.seeds) > 1:
            return dict.fromkeys(self.tables)
        return {
            r.name: noise(self.tables[r.name], _unable(r.name), self.apart) if r.random else Noise(silent=True)
            for r in RESPONSES
        }

    def against(self, response: str, arm: str, other: str = BASELINE) -> Estimate | None:
        """An arm minus another, within seeds."""
        return difference(self.tables[response], arm, other, self.noise[response])

    @property
    def compared(self) -> list[str]:
        """Arms that stand beside a baseline."""
        arms = list(self.study.arms)
        return [arm for arm in arms if arm not in (BASELINE, AGAIN)] if BASELINE in arms else []

    def mean(self, response: str, arm: str) -> float:
        """The mean of a response over an arm's seeds."""
        return float(np.mean([self.tables[response][cell.key].mean() for cell in self.study.arms[arm]]))

    def swaps(self, response: str) -> list[Swap]:
        """Leave-one-out and add-one-in of every level of the factorial."""
        design, arms = self.effects[response].design, self.study.arms
        named = {frozenset(levels(arm).items()): arm for arm in arms if arm != AGAIN}
        out = []
        for term in design.mains:
            ((factor, level),) = term
            rest = {f: names[1] for f, names in design.factors.items() if f != factor}
            everything = named.get(frozenset((rest | {factor: level}).items()))
            alone, without = named.get(frozenset({(factor, level)})), named.get(frozenset(rest.items()))
            out.append(
                Swap(
                    label(term),
                    self.against(response, alone) if alone and BASELINE in arms else None,
                    everything,
                    self.against(response, without, everything) if everything and without else None,
                )
            )
        return out

    @cached_property
    def budget(self) -> float:
        """Training seconds of the fastest arm: what every arm has had."""
        return min(float(np.mean([c.result["train_seconds"] for c in cells])) for cells in self.study.arms.values())

    def at_equal_time(self, arm: str) -> float | None:
        """Mean validation accuracy after `budget` seconds of training, between epochs interpolated; None if a seed had
        not finished its first epoch."""
        points = []
        for cell in self.study.arms[arm]:
            seconds, accuracy = ([row[k] for row in cell.rows] for k in ("seconds", "val/accuracy"))
            if seconds[0] > self.budget:
                return None
            points.append(np.interp(self.budget, seconds, accuracy))
        return float(np.mean(points))

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
        points = {
            arm: tuple(sign * self.mean(name, arm) for sign, name in zip(signs, responses, strict=True))
            for arm in self.study.arms
            if arm != AGAIN
        }
        return [
            arm
            for arm, p in points.items()
            if not any(q != p and all(b >= a for a, b in zip(p, q, strict=True)) for q in points.values())
        ]


def _unable(response: str) -> set[str]:
    """Factors that cannot change accuracy or loss: exact ones."""
    return of_contract("exact") if response in ("accuracy", "loss") else set()


def of_contract(contract: str) -> set[str]:
    """The names of the transforms with this contract."""
    return {name for name, transform in REGISTRY.items() if transform.contract == contract}
