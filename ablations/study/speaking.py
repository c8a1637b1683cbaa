"""How the commands speak: whatever the terminal's encoding, and of bad input in one message."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper

import rich.console

from core.errors import InputError


class Console(rich.console.Console):
    """A terminal that may be closed: the study goes on, and says nothing more."""

    def on_broken_pipe(self) -> None:
        """Instead of ending the process."""
        self.quiet = True
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self.file.fileno())


@contextmanager
def one_message(who: Callable[[], str] = str) -> Iterator[None]:
    """Ends the command with status 2, and a message without a traceback, for what its user can mend. Characters that
    the terminal cannot show are replaced. who: what stands before a message."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        yield
    except (InputError, OSError, UnicodeEncodeError) as error:  # the last: of a name that is no text in this locale
        told = error if isinstance(error, InputError) else InputError(str(error))  # in one line, whatever the name
        print(f"{who()}error: {told}", file=sys.stderr)
        sys.exit(2)
