"""Synthetic studies: cells with planted accuracies, times and bytes."""

import pytest
from synthetic import study


@pytest.fixture(scope="session")
def synthetic():
    """A function that writes a study and returns its folder."""
    return study
