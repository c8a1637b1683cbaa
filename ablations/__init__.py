"""Studies of training optimizations. From Python: `load` and `run` of ablations.library, loaded when asked for."""

import os
import resource
import sys
from typing import Any

_LEAST = 4 << 30  # bytes of addresses; torch takes 3.3 GB when it loads

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch loads: the memory pass would print a banner
if 0 <= (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) < _LEAST:  # torch would end the process without a word
    print(f"error: ulimit -v leaves {limit / 2**30:.1f} GiB, torch alone needs 4; raise it", file=sys.stderr)
    sys.exit(2)


def __getattr__(name: str) -> Any:
    if name not in ("load", "run", "Study"):
        raise AttributeError(f"module 'ablations' has no attribute '{name}'")
    from ablations import library  # statistics, for which the commands would wait

    return getattr(library, name)
