"""How all figures are drawn and kept: as PNG, and as SVG whose marks tell their values under the pointer."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

from core.errors import InputError, said

# Okabe and Ito: distinct to colour-blind readers and in grey print.
GREY, BLUE = "#777777", "#0072B2"
ORANGE, GREEN, PINK, SKY, AMBER = "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
LINES = (
    (BLUE, "o", "-"), (ORANGE, "s", "--"), (GREEN, "^", ":"), (PINK, "D", "-."), (SKY, "v", "-"), (AMBER, "P", "--"),
    ("#000000", "X", ":"), (GREY, "d", "-."),
)  # fmt: skip
_TOLD = "told:"


def pyplot() -> Any:
    """matplotlib.pyplot, without a display."""
    try:
        import matplotlib
    except ValueError as error:  # of what its variables or its matplotlibrc say
        raise InputError(f"matplotlib cannot be loaded ({said(error)}); mend or unset MPLBACKEND") from error

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


@contextmanager
def plain() -> Iterator[None]:
    """Within, figures are drawn in one style, SVGs with text as text; what a matplotlibrc or a notebook has set holds
    again afterwards."""
    with pyplot().rc_context():
        pyplot().rcdefaults()
        pyplot().rcParams.update({"svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False})
        yield


def tell(mark: Any, text: str) -> None:
    """Let a mark of a figure (a line, a bar) say this under the pointer."""
    mark.set_gid(_TOLD + text)


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG and, beside it, as SVG; close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    drawn = StringIO()
    with pyplot().rc_context({"svg.hashsalt": path.stem}):  # ids of their own: several figures share a page
        figure.savefig(drawn, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = re.sub(rf'<g id="{_TOLD}([^"]*)"', r"<g><title>\1</title", drawn.getvalue())
    path.with_suffix(".svg").write_text(svg[svg.index("<svg") :], encoding="utf-8")
    pyplot().close(figure)
