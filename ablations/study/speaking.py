"""How the commands speak: whatever the terminal's encoding, and of bad input in one message."""

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import fields, is_dataclass, replace
from io import StringIO, TextIOWrapper
from typing import IO, Any, TypeVar

import rich.console
import tyro

from core.errors import InputError

Options = TypeVar("Options")
_NO_THREAD = "start new thread|Resource temporarily unavailable"  # as Python and C++ say it


class Console(rich.console.Console):
    """A terminal that may be closed: the study goes on, and says nothing more."""

    def on_broken_pipe(self) -> None:
        """Instead of ending the process."""
        self.quiet = True
        _silence(self.file)


@contextmanager
def one_message(who: Callable[[], str] = str) -> Iterator[None]:
    """Ends the command with status 2, and a message without a traceback, for what its user can mend. Characters that
    the terminal cannot show are replaced. who: what stands before a message."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:  # it was closed: a file of the study would be what is told
        pass
    os.close(handle)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open to the end)
        if isinstance(stream := getattr(sys, name), TextIOWrapper):
            stream.reconfigure(errors="replace")
    threading.excepthook = _said_of_thread
    try:
        try:
            yield
        except SystemExit:  # after --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except (InputError, OSError, MemoryError, UnicodeEncodeError, RuntimeError, ModuleNotFoundError) as error:
        if isinstance(error, RuntimeError) and not re.search(_NO_THREAD, str(error)):
            raise
        told = error if isinstance(error, InputError) else InputError(_said(error))  # in one line, whatever the name
        with suppress(OSError):  # nobody is told, but by the status
            print(f"{who()}error: {told}", file=sys.stderr)
        sys.exit(2)


def words() -> list[str]:
    """The command line, with the home folder for a ~/ that the shell left. InputError for an empty value, which a path
    would take for the current folder, and for what is no text."""
    for option, word in zip(sys.argv, sys.argv[1:], strict=False):
        if not word or (word.startswith("--") and word.endswith("=")):
            raise InputError(f"the value of {(word or option).rstrip('=')} is empty; write one, or leave it out")
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"'{word}' is no text in this locale; set LC_ALL=C.UTF-8, or pass another") from error
    home = os.path.expanduser("~")
    return [re.sub(r"^(--[\w-]+=)?~(?=/)", lambda start: (start[1] or "") + home, word) for word in sys.argv[1:]]


def asked(kind: type[Options], arguments: Sequence[str], **default: Any) -> Options:
    """What a command line asks for, with all values of what takes several: of an option that is given again tyro keeps
    the last ones. InputError, in one line, for what tyro refuses, and for such an option without a value."""
    if re.fullmatch(r"0*1?[0-9]", os.environ.get("COLUMNS", "")):  # where a word has no room tyro never ends
        os.environ["COLUMNS"] = "20"
    told = StringIO()
    try:
        with redirect_stderr(told):
            made = tyro.cli(kind, args=arguments, **default)
    except SystemExit as end:
        if not end.code:  # after --help
            raise
        raise InputError(_unboxed(told.getvalue())) from None
    return _gathered(made, arguments)


def _gathered(options: Any, arguments: Sequence[str]) -> Any:
    found: dict[str, Any] = {}
    for name, value in ((field.name, getattr(options, field.name)) for field in fields(options)):
        option = f"--{name}"
        if is_dataclass(value):
            found[name] = _gathered(value, arguments)
        elif isinstance(value, tuple) and option in (word.partition("=")[0] for word in arguments):
            if not (values := all_values(option, arguments)):
                raise InputError(f"{option} has no value; write one, or leave it out")
            found[name] = tuple(values)
    return replace(options, **found)


def all_values(option: str, arguments: Sequence[str]) -> list[str]:
    """The values of an option that takes several, however it is given: `--option A B`, `--option=A`."""
    values, mine = [], False
    for word in arguments:
        if word.startswith("--"):
            name, _, word = word.partition("=")
            mine = name == option
        if mine and word:
            values.append(word)
    return values


def _unboxed(told: str) -> str:
    """What tyro says of a command line and, of the option that is meant, how it is written."""
    lines = re.sub(r"\x1b\[[0-9;]*m|^[╭│╰].|[╮│╯]$", "", told, flags=re.M).splitlines()
    parts: list[list[str]] = [[]]
    for line in map(str.strip, lines):
        if re.search(r"[─-]{5,}$", line):
            parts.append([])
        else:
            parts[-1].append(line)
    of, *about = [part for part in parts[1:] if part]
    said = re.sub(r"^Error parsing |\.? +Got errors:.*", "", " ".join(of)).strip(" .")
    meant = next(
        (f"; write {part[1]}" for part in about if part[0] in ("Argument helptext:", "Perhaps you meant:")), ""
    )
    return f"{said}{meant}; --help lists what there is"


def _said_of_thread(of: threading.ExceptHookArgs) -> None:
    """TensorBoard's, when a folder is gone or the disk is full: who writes next is told the same and ends by it."""
    print(f"{of.thread and of.thread.name}: {of.exc_type.__name__}: {of.exc_value}", file=sys.stderr)


def _said(error: Exception) -> str:
    """What an error says; of the standard output, which has no name, that it was this."""
    if isinstance(error, OSError) and error.filename is None:
        try:
            print(flush=True)
        except OSError as full:
            _silence(sys.stdout)
            return f"the standard output cannot be written: {full.strerror}"
    if isinstance(error, ModuleNotFoundError):
        return f"{error}; install the package that has it"
    if isinstance(error, RuntimeError):
        return f"no thread can be started ({error}); allow this user more processes (ulimit -u)"
    return str(error) or "there is no memory left"


def _silence(stream: IO[str]) -> None:
    """What is still said there, and at the end of the process, goes nowhere."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
