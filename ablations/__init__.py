"""Studies of training optimizations. From Python: `load` and `run` of ablations.library, loaded when asked for."""

import os
import resource
import signal
import sys
from typing import Any

_LEAST = 6 << 30  # bytes of addresses; torch takes 3.3 GB when it loads, a tiny study 5

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch loads: the memory pass would print a banner


def _unfit() -> str | None:
    """Why torch would end this process with words of its own, or a traceback."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if 0 <= limit < _LEAST:
        return f"ulimit -v leaves {limit / 2**30:.1f} GiB, and a study needs 6; raise it"
    try:
        os.getcwd()
    except OSError:
        return "the current folder is no longer there; change to another"
    try:
        import torch  # noqa: F401
    except Exception as error:  # also of what its variables say, such as TORCH_LOGS
        from core.errors import said

        return f"torch cannot be loaded ({said(error)}); mend that first"
    return None


if sys.argv[:1] and os.path.basename(sys.argv[0]) == "vit-ablations":  # installed; a script of ours does so itself
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the study listens: no traceback out of an import
if why := _unfit():
    print(f"error: {why}", file=sys.stderr)
    sys.exit(2)


def __getattr__(name: str) -> Any:
    if name not in ("load", "run", "Study"):
        raise AttributeError(f"module 'ablations' has no attribute '{name}'")
    from ablations import library  # statistics, for which the commands would wait

    return getattr(library, name)
