"""Optimizations that show what the seam can carry: each one file here and one line, held to tests/laws.py."""

from core.transforms.registry import Transform
from examples.lora import lora
from examples.muon import muon
from examples.qk_norm import qk_norm
from examples.registers import registers
from examples.stochastic_depth import stochastic_depth
from examples.token_merging import token_merging

EXAMPLES: dict[str, Transform] = {
    "token_merging": Transform(token_merging, "changes the objective", "similar tokens merged", {"r": 0}),
    "stochastic_depth": Transform(stochastic_depth, "changes the objective", "branches left out", {"rate": 0.0}),
    "registers": Transform(registers, "changes the objective", "learned tokens without a patch", {"count": 0}),
    "qk_norm": Transform(qk_norm, "changes the objective", "normalised q and k with a learned scale"),
    "lora": Transform(lora, "changes the objective", "low-rank updates, the rest frozen"),
    "muon": Transform(muon, "changes the update", "orthogonalised momentum for matrices"),
}
