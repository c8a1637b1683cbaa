"""run.py with a snapshot after every step and no time spent on timing and figures: what the fault suite kills.

Also a script, for what starts processes itself. In the environment: FAULTS holds constants as MODULE.NAME=VALUE, joined
by spaces; ENGINE=compiled compiles without generating code, ENGINE=graphed runs the body of the graphed loop.
"""

import importlib
import os
import signal
import sys
from ast import literal_eval

import torch

from ablations import run
from ablations.reporting import figures
from ablations.study import snapshots, timing
from core import engine


def prepare():
    """Set what time depends on, and the engine."""
    snapshots.EVERY, snapshots.SHARE = 0.0, float("inf")
    timing.BLOCK, timing.ROUNDS, timing.SHARE = 0.001, 2, 0
    timing.measure.ceiling = lambda dtype, device: 1e11
    figures.draw = lambda comparisons, out: {}
    chosen = os.environ.get("ENGINE")
    if chosen:
        backend = "inductor" if os.environ.get("INDUCTOR") else "aot_eager"
        engine.resolve = lambda name, device, work=0.0: (chosen, "tested")
        engine._cuda_graph = lambda body: body
        engine._compile = lambda fn: torch.compile(engine.fresh(fn), fullgraph=True, dynamic=False, backend=backend)
    for setting in os.environ.get("FAULTS", "").split():
        name, _, value = setting.partition("=")
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(module), constant, literal_eval(value))


def main(words, environment, log):
    """The command in a process of its own, its output in a file."""
    with open(log, "w") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as the script does
    os.environ |= environment
    os.setpgid(0, 0)
    sys.argv = ["run.py", *words]
    prepare()
    run.main()


if __name__ == "__main__":
    prepare()
    run.main()
