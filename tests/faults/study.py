"""run.py on a tiny model with a snapshot after every step: what the fault suite kills. Constants of the study that time
depends on are given as MODULE.NAME=VALUE in FAULTS, joined by spaces."""

import importlib
import os
import sys
from ast import literal_eval

from ablations import run
from ablations.study import snapshots, timing

snapshots.EVERY, snapshots.SHARE = 0.0, float("inf")
timing.BLOCK, timing.ROUNDS, timing.SHARE = 0.001, 2, 0
timing.measure.ceiling = lambda dtype, device: 1e11
for setting in os.environ.get("FAULTS", "").split():
    name, _, value = setting.partition("=")
    module, _, constant = name.rpartition(".")
    setattr(importlib.import_module(module), constant, literal_eval(value))

if __name__ == "__main__":
    if os.environ.get("GRAPHED"):  # its loop's body, run again instead of replayed
        from core import engine

        engine._cuda_graph = lambda body: body
        engine.resolve = lambda name, device, work=0.0: ("graphed", "tested")
    if not os.environ.get("FIGURES"):  # they take seconds
        from ablations.reporting import figures

        figures.draw = lambda comparisons, out: {}
    sys.exit(run.main())
