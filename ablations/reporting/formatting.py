"""Numbers as they are written: differences with their intervals, tables in Markdown."""

import re
from collections.abc import Iterable, Mapping, Sequence
from math import isnan
from typing import Any

import pandas as pd

from ablations.analysis.responses import BY_NAME, COMPARED, Response
from ablations.analysis.verdicts import AGAINST_CONTROL
from core.errors import InputError

UNITS = {"accuracy": "points", "loss": "", "step time": "%", "peak memory": "%"}
_FORMS = {"accuracy": "+.2f", "loss": "+.4f", "step time": "+.1f", "peak memory": "+.1f"}


def table(frame: pd.DataFrame) -> list[str]:
    """A Markdown table of strings, a line each (pandas needs a package for it)."""
    rows = [frame.columns, ["---"] * frame.shape[1], *frame.itertuples(index=False)]
    return ["| " + " | ".join(row) + " |" for row in rows]


def spread(values: Sequence[float] | pd.Series, form: str, shown: bool = True) -> str:
    """The mean, with the standard deviation where there are several different values."""
    series = pd.Series(values)
    centre = format(series.mean(), form)
    return f"{centre} ± {format(series.std(), form)}" if shown and series.nunique() > 1 else centre


def signed(response: Response, value: float) -> str:
    """A difference with its sign, in the response's unit."""
    return written(response, response.shown(value))


def written(response: Response, shown: float) -> str:
    """A number in a response's unit with its sign: `+1.25`; from a thousand on, which only an interval's end can be,
    `>+999`."""
    if isnan(shown):
        return "?"
    if shown >= 1000:
        return ">+999"
    text = format(shown, _FORMS[response.name])
    return text.replace("-", "−") if nonzero(text) else text.lstrip("+-")


def nonzero(text: str) -> bool:
    """Whether a number is another than zero as it is written."""
    return any(digit in text for digit in "123456789")


def told(row: Mapping[Any, Any]) -> bool:
    """Whether a row of differences is told from zero, by the intervals that hold together."""
    clear = row["low_together"] > 0 or row["high_together"] < 0
    return clear and nonzero(signed(BY_NAME[row["response"]], row["estimate"]))


def interval(row: Mapping[Any, Any], together: bool = True) -> str:
    """`+1.25 [−0.40, +2.90]` of a row of differences, without an interval if there is none."""
    response = BY_NAME[row["response"]]
    value = signed(response, row["estimate"])
    if isnan(row["se"]):
        return value
    low, high = (signed(response, row[end + "_together" * together]) for end in ("low", "high"))
    return f"{value} [{low}, {high}]" if low != high else value


def judged(row: Mapping[Any, Any]) -> str:
    """A verdict with its numbers: `**better** +1.25 [+0.40, +2.10]`."""
    verdict = f"**{row['verdict']}**" + " (cells failed)" * row["by_failures"]
    if isnan(row["estimate"]):
        return verdict
    response = BY_NAME[row["response"].removesuffix(AGAINST_CONTROL)]
    value, low, high = (written(response, row[key]) for key in ("estimate", "low", "high"))
    if isnan(row["low"]):
        return f"{verdict} {value}, no interval"
    told = f" ({'better' if row['estimate'] * response.better > 0 else 'worse'}, by less than the margin)"
    return f"{verdict}{told * (row['within'] and nonzero(value))} {value}" + f" [{low}, {high}]" * (low != high)


def title(name: str) -> str:
    """A response with its unit."""
    return f"{name}, {UNITS[name]}" if UNITS[name] else name


def by_response(frame: pd.DataFrame, keys: Sequence[str], responses: Iterable[str] = COMPARED) -> pd.DataFrame:
    """Differences as text, a row a comparison and a column a response: bold what is told from zero."""
    texts = [_bold(interval(row)) if told(row) else interval(row) for row in frame.to_dict("records")]
    wide = frame.assign(text=texts).pivot(index=list(keys), columns="response", values="text")
    order = frame[list(keys)].drop_duplicates()
    wide = wide.reindex(pd.MultiIndex.from_frame(order) if len(keys) > 1 else order[keys[0]])
    wide = wide.reindex(columns=list(responses)).astype(object).fillna("—").rename(columns=title).reset_index()
    return wide.assign(**{key: wide[key].map("`{}`".format) for key in keys})


def _bold(text: str) -> str:
    value, space, bounds = text.partition(" ")
    return f"**{value}**{space}{bounds}"


def verbatim(text: str) -> str:
    """What is no text of ours (an error, a path), in a line of Markdown that shows it as it is."""
    line = str(InputError(" ".join(text.split())))
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence, pad = "`" * (longest + 1), " " * bool(longest)
    return f"{fence}{pad}{line}{pad}{fence}"


def listed(names: Sequence[str]) -> str:
    """`a`, `b` and `c`."""
    quoted = [f"`{name}`" for name in names]
    return " and ".join(filter(None, [", ".join(quoted[:-1]), *quoted[-1:]]))
