"""Which tensors each block rebuilds, so that a step's peak is at most a size and the fewest FLOPs are computed again.

What a level (the tensors that a block rebuilds) costs in FLOPs and saves in bytes adds up over blocks that are alike: a
model of two tells it. Of all plans those are candidates that rebuild more bytes than every cheaper one,
in the order of (FLOPs, bytes rebuilt); the first whose peak is within the size is taken. So a larger size never costs
more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from core.errors import InputError
from core.sizes import read_bytes

if TYPE_CHECKING:
    from core.account.step import Account
    from core.vit import VitConfig

Level = tuple[str, ...]


class Candidate(NamedTuple):
    """A plan of some blocks: FLOPs computed again, bytes rebuilt instead of kept, each block's level, heaviest first
    (their transients then meet the fewest kept tensors)."""

    flops: int
    rebuilt: int
    levels: tuple[Level, ...]


def read_size(text: str) -> float:
    """A share in (0, 1], or bytes; InputError for what is neither."""
    try:
        share = float(text)
    except ValueError:
        return read_bytes(text)
    if not 0 < share <= 1:
        raise InputError(f"budget {text} is no share in (0, 1]; write a size with its unit, such as 3GB")
    return share


def choose_plan(
    size: str,
    levels: Sequence[Level],
    config: VitConfig,
    few: VitConfig,
    cost: Callable[[Sequence[Level], VitConfig], Account],
) -> tuple[Level, ...]:
    """The level of every block.

    levels: to choose from; the first rebuilds nothing. few: of a model of fewer such blocks, where these are alike.
    cost: the account of a step with a plan (of one level: for all blocks) and a config. Raises InputError, naming the
    least that can be had, for a size below it.
    """
    nothing = [levels[0]] * (few.depth - 1)  # in the last block, which a transform may have changed
    base, plain = cost(levels[:1], few), cost(levels[:1], config)
    prices: dict[Level, tuple[int, int]] = {}
    for level in levels:
        account = cost([level, *nothing], few)
        prices[level] = account.flops - base.flops, base.kept_bytes - account.kept_bytes

    @cache
    def transient(lightest: Level) -> int:
        account = plain if lightest == levels[0] else cost([lightest], config)
        return account.peak_bytes - account.kept_bytes

    def bound(plan: Candidate) -> int:  # of a plan that keeps as much, and rebuilds the least in every block
        return plain.kept_bytes - plan.rebuilt + transient(plan.levels[-1])

    share, plans = read_size(size), candidates(prices, config.depth)
    limit = int(share * plain.peak_bytes if share <= 1 else share)
    for plan in plans:
        if bound(plan) <= limit and cost(plan.levels, config).peak_bytes <= limit:
            return plan.levels
    least = plain.peak_bytes
    for plan in sorted(plans, key=bound):
        if bound(plan) < least:
            least = min(least, cost(plan.levels, config).peak_bytes)
    raise InputError(f"budget {size} is below the least that this step can do with, {least} bytes: write {_up(least)}")


def _up(size: int) -> str:
    """A size of three figures that is no smaller."""
    unit = 10 ** max(len(str(size)) - 3, 0)
    figures = -(-size // unit) * unit
    name, scale = next((n, s) for n, s in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)) if figures >= s or s == 10**3)
    return f"{figures / scale:g}{name}"


def candidates(prices: Mapping[Level, tuple[int, int]], depth: int) -> list[Candidate]:
    """Of all plans of so many blocks those that rebuild more bytes than every cheaper one, from the cheapest.

    prices: FLOPs and bytes of a block by level.
    """
    frontier = [Candidate(0, 0, ())]
    for _ in range(depth):
        found = sorted(
            Candidate(c.flops + flops, c.rebuilt + rebuilt, (*c.levels, level))
            for c in frontier
            for level, (flops, rebuilt) in prices.items()
        )
        frontier = []
        for candidate in found:
            if not frontier or candidate.rebuilt > frontier[-1].rebuilt:
                frontier.append(candidate)
    return [c._replace(levels=tuple(sorted(c.levels, key=prices.__getitem__, reverse=True))) for c in frontier]
