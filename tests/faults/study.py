"""run.py with a snapshot after every step and no time spent on timing and figures: what the fault suite kills.

Also a script, for what starts processes itself. In the environment: WHOLE=1 adds the timing pass and the report; DIES
is an arm that kills its process; ENGINE=compiled traces the step, and with BACKEND=inductor compiles it; ENGINE=graphed
runs the body of the graphed loop.
"""

import gc
import importlib
import os
import signal
import sys

import torch

from ablations.commands.main import main as command
from ablations.reporting import figures, terminal
from ablations.study import cells, snapshots, timing
from core import engine

for late in ("sklearn.model_selection", "torch.utils.tensorboard", "torch._dynamo", "PIL.Image"):
    importlib.import_module(late)  # once, before processes are forked: the study imports them where it needs them
gc.freeze()  # and what is there now is not collected by each of them again


def prepare():
    """Set what time depends on, and the engine."""
    snapshots.EVERY, snapshots.SHARE = 0.0, float("inf")
    timing.BLOCK, timing.ROUNDS, timing.SHARE = 0.001, 2, 0
    timing.measure.ceiling = lambda dtype, device: 1e11
    figures.draw = lambda comparisons, out: {}
    if not os.environ.get("WHOLE"):
        timing.complete = lambda out, cells: True
        terminal.conclude = lambda out, console: None
    chosen = os.environ.get("ENGINE")
    if chosen:
        engine.resolve = lambda name, device, work=0.0: (chosen, "tested")
        engine._cuda_graph = lambda body: body
        backend = os.environ.get("BACKEND", "eager")
        whole = {"fullgraph": True, "dynamic": False, "backend": backend}
        engine._compile = lambda fn: torch.compile(engine.fresh(fn), **whole) if chosen == "compiled" else fn
    if arm := os.environ.get("DIES"):
        warm = cells.Prepared.warmed_up.func
        crashing = lambda cell: os.kill(os.getpid(), signal.SIGKILL) if cell.arm.name == arm else warm(cell)  # noqa: E731
        cells.Prepared.warmed_up.func = crashing


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
    command()


if __name__ == "__main__":
    prepare()
    command()
