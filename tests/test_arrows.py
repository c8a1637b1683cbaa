"""Arrows between rooms go one way, and the optimizations know the seam, not the model."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SEAM = {f"core.{name}" for name in ("attached", "errors", "initializers", "layers", "ops", "rng", "sizes")}
KNOWN = {  # what a room may import besides itself: modules, or all of a room
    "core": {"core"},
    "core/transforms": SEAM,
    "ablations/study": {"core"},
    "ablations/analysis": {"ablations.study", "core"},
    "ablations/reporting": {"ablations.analysis", "ablations.study", "core"},
    "ablations/benchmarks": {"ablations.study", "core"},
}


def imported(path):
    """Modules of ours that a file imports when it runs: not those of its types alone."""
    nodes = list(ast.parse(path.read_text()).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom) and node.module in ("core", "ablations"):
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("core", "ablations"):
            yield node.module


@pytest.mark.parametrize("room", KNOWN)
def test_a_room_imports_what_is_below_it(room):
    allowed = {room.replace("/", "."), *KNOWN[room]}
    for path in (ROOT / room).rglob("*.py"):
        above = [name for name in imported(path) if not any(f"{name}.".startswith(f"{of}.") for of in allowed)]
        assert not above, path
