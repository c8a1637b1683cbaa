"""How many faults were tried and survived, told at the end of the run."""

from collections import Counter

import pytest
from faults.processes import context, draw, many, reference, start  # noqa: F401 (fixtures)

_TRIED: Counter[str] = Counter()  # by what was damaged


@pytest.fixture(scope="session")
def tried():
    """A counter: of each kind of fault how many were tried and survived."""
    return _TRIED


def pytest_terminal_summary(terminalreporter):
    """A line."""
    if _TRIED:
        each = ", ".join(f"{count:,} {what}" for what, count in _TRIED.items())
        terminalreporter.line(f"{sum(_TRIED.values()):,} faults tried and survived: {each}")
