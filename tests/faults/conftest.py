"""Fixtures of the faults that are tried."""

from faults.processes import context, draw, many, reference, start  # noqa: F401
