"""Code: Python files of a user's, run where he names them and nowhere else; functions copied."""

import ast
import hashlib
import importlib.util
import os
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from core import process
from core.errors import InputError, said

ran: dict[Path, str] = {}  # the user's files that this process ran, and the SHA-256 of what they held then
imported: dict[Path, list[Path]] = {}  # those that one of them imports, and these in turn
_HERE = Path(__file__).parents[1]
_OTHERS = (Path(sysconfig.get_path("stdlib")), _HERE / "core", _HERE / "ablations")


@process.as_it_was()
def run(file: str, what: str) -> ModuleType:
    """What a Python file defines; what it prints goes to stderr. InputError, which begins with `what`, for no such file
    and one that raises."""
    path = Path(os.path.realpath(file))
    if not path.is_file():
        raise InputError(f"{what}: '{file}' {'is no file' if path.exists() else 'does not exist'}")
    name = f"{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{what}: '{file}' is no Python file; name one that ends in .py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    printed, err = StringIO(), sys.stderr
    try:
        content = path.read_bytes()
        with redirect_stdout(printed):
            exec(compile(content, path, "exec"), vars(module))  # not what was compiled when it had this time and size
        ran[path] = hashlib.sha256(content).hexdigest()
        imported[path] = _imported(content, "", {})
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # exit() too: the command would end as if all were well
        raise InputError(f"{what}: '{file}' raises {said(error)}; mend it") from error
    if printed.closed:
        raise InputError(f"{what}: '{file}' closes the standard output; mend it")
    print(printed.getvalue(), end="", file=err)
    return module


def _imported(content: bytes, package: str, found: dict[Path, bytes]) -> list[Path]:
    """The files of the user's own modules that a source imports, and these in turn: what is not installed."""
    for module in map(sys.modules.get, _names(content, package)):
        path = Path(os.path.realpath(getattr(module, "__file__", None) or os.devnull))
        if path.suffix == ".py" and path not in found and _is_own(path):
            found[path] = path.read_bytes()
            ran.setdefault(path, hashlib.sha256(found[path]).hexdigest())
            _imported(found[path], getattr(module, "__package__", None) or "", found)
    return list(found)


def _names(content: bytes, package: str) -> Iterator[str]:
    """Of the modules that a source may import, and of the packages that they are in."""
    for node in ast.walk(ast.parse(content)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (package or not node.level):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            yield from (name[:i] for i in range(len(name) + 1) if name[i : i + 1] in ("", "."))


def _is_own(path: Path) -> bool:
    return not {"site-packages", "dist-packages"} & {*path.parts} and not any(map(path.is_relative_to, _OTHERS))


def fresh(fn: Any) -> Callable[..., Any]:
    """The same function with a code object of its own. torch.compile keeps its results by code object: the arms' losses
    would share one list, be checked against each other's guards at every call, and reach its limit."""
    return FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
