"""The study: which optimizations are run together, what is recorded, and what follows from it."""
