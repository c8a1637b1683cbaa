"""Whether a cell is of its study: what the study's own record determines of a result, beside what that says."""

from collections.abc import Mapping
from typing import Any

from ablations.study import schema
from ablations.study.arms import PRECISIONS
from ablations.study.store import Result
from core.data.splits import held_out

_SET = ("preset", "data", "epochs", "batch_size", "device", "engine")  # as the configuration has them


def differences(study: Mapping[str, Any], result: Result) -> list[str]:
    """`batch_size 64, not 32`, of each field of a cell's result that the content of study.json has otherwise. What an
    earlier version did not record is let be."""
    known = {name: value for name, value in _by_settings(study, result).items() if name in result}
    if result.get("identity") == study.get("identity"):  # of others a report tells
        known |= _by_data(study, result)
    return [f"{k} {_short(result.get(k))}, not {_short(of)}" for k, of in known.items() if result.get(k) != of]


def _by_settings(study: Mapping[str, Any], result: Result) -> Result:
    configuration, torch = study["configuration"], study["environment"]["torch"]
    precision = next((part for part in result["arm"].split("+") if part in PRECISIONS), configuration["precision"])
    own = {"precision": precision, "torch": torch, "settings": schema.settings(study)}
    return own | {name: configuration[name] for name in _SET}


def _by_data(study: Mapping[str, Any], result: Result) -> Result:
    parts, parameters = study.get("parts"), study.get("parameters", {}).get(result["arm"])
    out = {} if parts is None else {"held_out": held_out(result["seed"], parts)}
    return out if parameters is None else out | {"parameters": parameters}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 64 else f"{text[:12]}…"
