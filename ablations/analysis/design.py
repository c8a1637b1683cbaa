"""The factorial of a study: which effects its arms determine, and each effect as weights of the arms' values."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import combinations

import numpy as np

from ablations.analysis.estimates import Values
from ablations.analysis.factors import Term, levels, without


@dataclass(frozen=True)
class Design:
    """A linear model of these arms: an intercept, the main effects, and the interactions of every two levels that some
    arm has together, but for `dropped` ones. Levels without one are taken not to interact (`apart` names them)."""

    arms: tuple[str, ...]
    dropped: tuple[Term, ...] = ()

    @cached_property
    def factors(self) -> dict[str, list[str]]:
        """Levels of each factor, "off" first."""
        pairs = sorted({pair for arm in self.arms for pair in levels(arm).items()})
        return {factor: ["off", *(lv for f, lv in pairs if f == factor)] for factor, _ in pairs}

    @cached_property
    def mains(self) -> list[Term]:
        """Main effects: each level against off."""
        return [((factor, level),) for factor, names in self.factors.items() for level in names[1:]]

    @cached_property
    def pairs(self) -> list[Term]:
        """Interactions in the model."""
        met = [pair for pair in self._all_pairs if any(_has(levels(arm), pair) for arm in self.arms)]
        return [pair for pair in met if pair not in self.dropped]

    @cached_property
    def apart(self) -> list[Term]:
        """Pairs of levels without an interaction in the model."""
        return [pair for pair in self._all_pairs if pair not in self.pairs]

    @property
    def _all_pairs(self) -> list[Term]:
        return [(*a, *b) for a, b in combinations(self.mains, 2) if a[0][0] != b[0][0]]

    def rows(self, arms: Iterable[str], terms: Sequence[Term]) -> Values:
        """Indicators [arms, 1 + terms] of the intercept and the terms."""
        return np.array([_row(levels(arm), terms) for arm in arms])

    @lru_cache(maxsize=4096)  # noqa: B019 (a design is a small constant)
    def weights(self, term: Term, present: tuple[str, ...]) -> Values | None:
        """Least squares as weights [arms] of these arms' values; None if they do not determine the effect.

        A main effect is the mean of (level - off) over all settings of the other factors, levels left out that it never
        met; an interaction the mean of ((both) - (first)) - ((second) - (neither)): by how much one effect changes when
        the other is on. Where arms do not tell all interactions apart, a main effect is the mean over those arms that
        have it of (with it - the same without it), if all of these are there: it needs no model of the rest.
        """
        if len(term) == 1 and self.apart and (matched := _matched(term, present)) is not None:
            return matched
        terms = [*self.mains, *self.pairs]
        X = self.rows(present, terms)
        others = {
            f: [lv for lv in names if lv == "off" or all(self._met(pair, (f, lv)) for pair in term)]
            for f, names in self.factors.items()
            if f not in dict(term)
        }
        contrast = np.zeros(X.shape[1])
        for i, other in enumerate(terms, start=1):
            if set(term) <= set(other):  # the others cancel; of the rest of this one the mean over those settings
                contrast[i] = np.prod([(lv in others[f]) / len(others[f]) for f, lv in set(other) - set(term)])
        w = np.linalg.pinv(X).T @ contrast
        return w if np.allclose(X.T @ w, contrast, atol=1e-8) else None

    @cached_property
    def aliases(self) -> list[list[Term]]:
        """Interactions that these arms cannot tell from each other, for they are on and off together: as the products
        of their factors' signs, alike or opposite in every arm."""
        groups: dict[bytes, list[Term]] = {}
        for pair in self.pairs:
            signs = np.array([np.prod([2 * _has(levels(arm), (one,)) - 1 for one in pair]) for arm in self.arms])
            groups.setdefault((signs * signs[0]).tobytes(), []).append(pair)
        return [pairs for pairs in groups.values() if len(pairs) > 1]

    def _met(self, one: tuple[str, str], other: tuple[str, str]) -> bool:
        return (one, other) in self.pairs or (other, one) in self.pairs

    def determined(self) -> "Design":
        """This design, without interactions that keep its arms from determining every main effect."""
        if self._mains_determined():
            return self
        dropped = set(self.pairs)
        for pair in self.pairs:
            trial = replace(self, dropped=tuple(p for p in self.pairs if p in dropped - {pair}))
            dropped -= {pair} if trial._mains_determined() else set()
        return replace(self, dropped=tuple(p for p in self.pairs if p in dropped))

    def _mains_determined(self) -> bool:
        return all(self.weights(term, self.arms) is not None for term in self.mains)


def _matched(term: Term, present: Sequence[str]) -> Values | None:
    """The mean over the arms with this level of (arm - the arm without it); None if one of these is not there."""
    pairs, w = without(term, present), np.zeros(len(present))
    for arm, other in pairs.items():
        if other is None:
            return None
        w[present.index(arm)] += 1 / len(pairs)
        w[present.index(other)] -= 1 / len(pairs)
    return w if pairs else None


def _has(setting: Mapping[str, str], term: Term) -> bool:
    return all(setting.get(factor) == level for factor, level in term)


def _row(setting: Mapping[str, str], terms: Sequence[Term]) -> Values:
    return np.array([1.0, *(float(_has(setting, term)) for term in terms)])
