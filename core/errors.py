"""Errors a user can mend: each names the value, what is legal, and what to type instead; what others say."""

from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 1000  # characters of a message


class InputError(ValueError):
    """A value from outside that cannot be used; the commands print its message without a traceback."""

    def __str__(self) -> str:
        """In one line, whatever the value: what cannot be printed escaped, the middle of a long text left out."""
        told = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in super().__str__())
        return told if len(told) <= LONGEST else f"{told[: LONGEST // 2]} … {told[-LONGEST // 2 :]}"


def within(what: str, value: float, least: float, most: float) -> None:
    """InputError for a number that is not from `least` to `most`, both included."""
    if not least <= value <= most:
        raise InputError(f"{what} {value} is outside {least:,} to {most:,}")


def choose(what: str, value: str, legal: Iterable[str]) -> str:
    """Return `value` if it is one of `legal`, else raise InputError naming the closest spelling."""
    names = list(legal)
    if value in names:
        return value
    lower = {name.lower(): name for name in names}
    close = [lower[name] for name in get_close_matches(value.lower(), lower, n=1, cutoff=0.4)]
    hint = f"; did you mean '{close[0]}'?" if close else ""
    raise InputError(f"unknown {what} '{value}'; legal: {', '.join(names)}{hint}")


def said(error: BaseException) -> str:
    """An error's kind and the first line of what it says."""
    try:
        text = str(error).strip()
    except Exception:
        text = ""
    return f"{type(error).__name__}: {(text or 'no message').splitlines()[0]}"
