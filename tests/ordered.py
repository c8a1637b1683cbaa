"""Orders of a tiny study, and who watches them."""

from pathlib import Path

from ablations.study import orders
from ablations.study.recipes import Recipe

RECIPE = Recipe(
    image=16, patch=8, width=16, depth=1, heads=2, mlp=16, epochs=2, batch_size=96, device="cpu", engine="eager"
)
CELLS = [("baseline", 0), ("decatt", 0), ("baseline", 1)]


class Watch:
    """Keeps what a study says."""

    def __init__(self):
        self.notes, self.outcomes = [], []

    def cell(self, arm, seed, steps, done=0): ...

    def step(self): ...

    def epoch(self, row): ...

    def done(self, outcome):
        self.outcomes.append(outcome)

    def note(self, text):
        self.notes.append(text)


def order(out, **changes):
    about = {"recipe": RECIPE, "root": Path("data"), "out": out, "here": Path.cwd(), "threads": 1} | changes
    return orders.Order("baseline,decatt", preset="quick", deterministic=False, accept_changes=False, **about)
