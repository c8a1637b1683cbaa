"""The optimizations, one a file; registry.py has a line for each."""
