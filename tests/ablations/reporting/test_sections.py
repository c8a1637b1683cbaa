"""What a report's first sentence says of its terms."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from ablations.reporting import sections
from ablations.study.presets import PRESETS
from core.data.splits import outlined


@pytest.mark.parametrize("preset", ["quick", "matched", "published"])
def test_all_that_was_asked_for_is_told_and_nothing_else(preset):
    """Also where the preset has nothing, and of settings."""
    data = outlined("digits", 32, 3, ["0", "1"], (4000, 10))

    def told(**values):
        recipe = replace(PRESETS[preset], **values).resolve_data(data)
        configuration = json.loads(
            json.dumps({"preset": preset, **asdict(replace(recipe, image=PRESETS[preset].image))})
        )
        environment = {"device_name": "a processor", "torch": "2"}
        study = SimpleNamespace(configuration=configuration, environment=environment)
        return sections.terms(SimpleNamespace(study=study)).partition(" Changed from the preset: ")[2]

    assert told() == ""
    settings = (*PRESETS[preset].set, "decatt.weight=3", "mrt.tokens=9")
    asked = told(ema=0.999, weights="w.safetensors", epochs=3, set=settings)
    before = PRESETS[preset].epochs
    assert asked == (
        f"weights None -> w.safetensors, epochs {before} -> 3, ema None -> 0.999, decatt.weight=3, mrt.tokens=9."
    )
