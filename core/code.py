"""Code: Python files of a user's, run where he names them and nowhere else; what an error says; functions copied."""

import hashlib
import importlib.util
import os
import sys
import zlib
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from core import process
from core.errors import InputError

ran: dict[Path, str] = {}  # the files that this process ran, and the SHA-256 of what they held then


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
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # exit() too: the command would end as if all were well
        raise InputError(f"{what}: '{file}' raises {said(error)}; mend it") from error
    if printed.closed:
        raise InputError(f"{what}: '{file}' closes the standard output; mend it")
    print(printed.getvalue(), end="", file=err)
    return module


def said(error: BaseException) -> str:
    """An error's kind and the first line of what it says."""
    try:
        text = str(error).strip()
    except Exception:
        text = ""
    return f"{type(error).__name__}: {(text or 'no message').splitlines()[0]}"


def fresh(fn: Any) -> Callable[..., Any]:
    """The same function with a code object of its own. torch.compile keeps its results by code object: the arms' losses
    would share one list, be checked against each other's guards at every call, and reach its limit."""
    return FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
