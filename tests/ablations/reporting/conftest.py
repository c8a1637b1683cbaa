"""Synthetic studies: cells with planted accuracies, times and bytes."""

import pytest
from synthetic import study

from ablations.reporting import figures


@pytest.fixture(scope="session")
def synthetic():
    """A function that writes a study and returns its folder."""
    return study


@pytest.fixture
def undrawn(monkeypatch):
    """A report without figures, which take longest."""
    monkeypatch.setattr(figures, "draw", lambda comparisons, out: {})
