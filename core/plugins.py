"""Optimizations and data sets from outside: files named by --plugin, and installed packages.

A file defines TRANSFORMS, a dict of core.transforms.registry.Transform by name, and DATA, a dict of functions that
return a data set's splits, or one of them. A package names each as an entry point of the group vit_ablations.transforms
or vit_ablations.data. Files come after packages, so that a package's file may be tried while it is installed.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from core import code
from core.data import sets
from core.errors import InputError, said
from core.transforms.registry import REGISTRY, Transform

RESERVED = (
    *("baseline", "baseline-again", "fp32", "bf16"),
    *("all", "published", "finetune", "controls", "lattice", "half", "more"),
)
_OWN = frozenset(REGISTRY)
_FIELDS = TypeAdapter(Transform)
_from: dict[str, str] = {}  # name -> the package or file that registered it


def load(files: Sequence[str] = ()) -> list[str]:
    """Register what installed packages and these files bring; the names of the files' optimizations. Again: the same.

    Raises InputError for a file or package that cannot be loaded, and for a name that is taken.
    """
    for group, register in (("vit_ablations.transforms", _transform), ("vit_ablations.data", _data)):
        for point in entry_points(group=group):
            origin = f"package {point.dist.name if point.dist else point.value}"
            if point.name in _from:
                continue
            try:
                value = point.load()
            except Exception as error:
                raise InputError(f"{origin}: {point.value} raises {said(error)}; mend or remove it") from error
            register(point.name, value, origin)
    return [name for file in files for name in _file(file)]


def of_files() -> set[str]:
    """The optimizations that files brought."""
    return {name for name, origin in _from.items() if origin.startswith("plugin ") and name in REGISTRY}


def missing(names: Sequence[str], files: Sequence[str]) -> str | None:
    """What to type for optimizations that nobody registered; None if all are. files: those of the study."""
    unknown = [name for name in dict.fromkeys(names) if name not in (*REGISTRY, *RESERVED)]
    if not unknown:
        return None
    option = f"--plugin {' '.join(files)}" if files else "--plugin FILE, or install the package that has it"
    return f"optimization {', '.join(unknown)} is not registered here; pass {option}"


def _file(file: str) -> list[str]:
    origin = f"plugin '{file}'"
    if origin in _from.values():
        return [name for name, where in _from.items() if where == origin and name in REGISTRY]
    defined = vars(code.run(file, "plugin"))
    found = {kind: defined.get(kind, {}) for kind in ("TRANSFORMS", "DATA")}
    if not any(found.values()) or not all(isinstance(value, dict) for value in found.values()):
        raise InputError(
            f"{origin} defines no dict TRANSFORMS of Transform by name and no dict DATA of functions by name"
        )
    for kind, register in (("TRANSFORMS", _transform), ("DATA", _data)):
        for name, value in {**found[kind]}.items():
            register(name, value, origin)
    return list(found["TRANSFORMS"])


def _transform(name: str, value: Any, origin: str) -> None:
    if not isinstance(value, Transform):
        raise InputError(
            f"{origin}: optimization '{name}' is a {type(value).__name__}, not a Transform(build, contract, about, …) "
            "of core.transforms.registry"
        )
    try:
        _FIELDS.validate_python(vars(value))
        inspect.signature(value.build), get_type_hints(value.build)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        raise InputError(f"{origin}: optimization '{name}' has no right {at}: {first['msg']}") from error
    except Exception as error:
        raise InputError(f"{origin}: what builds '{name}' is no function: {said(error)}") from error
    if value.control not in (None, *REGISTRY):
        raise InputError(f"{origin}: the control of '{name}', {value.control}, is not registered; write it before")
    _claim(name, origin, _OWN)
    REGISTRY[name] = value


def _data(name: str, value: Any, origin: str) -> None:
    if not isinstance(value, Callable):  # type: ignore[arg-type]
        raise InputError(
            f"{origin}: data set '{name}' is a {type(value).__name__}, not a function that returns its splits"
        )
    _claim(name, origin, ())
    sets.PLUGGED[name] = value


def _claim(name: str, origin: str, own: Any) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9-]*", name) or name in RESERVED:
        raise InputError(f"{origin}: the name {name!r} cannot be an arm's; use small letters, digits and -")
    other = "vit-ablations itself" if name in own else _from.get(name, origin)
    if other != origin and not other.startswith("package "):
        raise InputError(f"{origin}: the name '{name}' is taken by {other}; choose another")
    _from[name] = origin
