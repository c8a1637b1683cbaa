"""How all figures are drawn and kept."""

from pathlib import Path
from typing import Any

# Okabe and Ito: distinct to colour-blind readers and in grey print.
GREY, BLUE = "#777777", "#0072B2"
ORANGE, GREEN, PINK, SKY, AMBER = "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
LINES = (
    (BLUE, "o", "-"), (ORANGE, "s", "--"), (GREEN, "^", ":"), (PINK, "D", "-."), (SKY, "v", "-"), (AMBER, "P", "--"),
    ("#000000", "X", ":"), (GREY, "d", "-."),
)  # fmt: skip


def pyplot() -> Any:
    """matplotlib.pyplot, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path) -> None:
    """Write and close a figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    pyplot().close(figure)
