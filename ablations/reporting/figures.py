"""The figures of a report: those that a study has something for, each as PNG and most as SVG beside it."""

from pathlib import Path

from ablations.analysis.comparisons import Comparisons
from ablations.reporting import cost_figures, effect_figures, learning_curves, token_pictures
from core.transforms.registry import REGISTRY

Drawn = dict[str, Path]  # figures by name, in the report's order
CAPTIONS = {
    "effects": "Mean effects with intervals that hold together; filled: zero is outside. Below a dashed line "
    "the largest interactions, if any is told from zero.",
    "pareto": "Accuracy after the last epoch (± standard deviation over seeds) against cost. Filled: no other arm has "
    "better means in both; the line joins these.",
    "learning_curves": "Validation accuracy by epoch: the baseline, each optimization alone and the arm with the "
    "highest mean; exact ones coincide with the arm without them. Bands: standard deviation over seeds.",
    "kept_bytes": "Bytes kept for the backward pass, by layer and operation; arms that keep the same once, twelve "
    "at most.",
}


def draw(comparisons: Comparisons, folder: Path) -> Drawn:
    """Every figure, in this folder; of pictures of tokens one a way to cut images."""
    drawn: Drawn = {}

    def path(name: str) -> Path:
        return drawn.setdefault(name, folder / f"{name}.png")

    learning_curves.draw(comparisons, path("learning_curves"))
    cost_figures.kept(comparisons, path("kept_bytes"))
    if len(comparisons.study.arms) > 1:
        cost_figures.pareto(comparisons, path("pareto"))
    if not comparisons.effect_table.empty:
        effect_figures.effects(comparisons, path("effects"))
    for arm, cells in comparisons.study.arms.items():
        cut = "+".join(part for part in arm.split("+") if _cuts(part.partition("@")[0]))
        if cut and f"tokens_{cut}" not in drawn and (found := cells[0].tokens):
            token_pictures.draw(found, path(f"tokens_{cut}"))
    return drawn


def _cuts(name: str) -> bool:
    return name in REGISTRY and REGISTRY[name].layout is not None
