"""Studies of training optimizations. From Python: `load` and `run` of ablations.library, loaded when asked for."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name not in ("load", "run", "Study"):
        raise AttributeError(f"module 'ablations' has no attribute '{name}'")
    from ablations import library  # statistics, for which the commands would wait

    return getattr(library, name)
