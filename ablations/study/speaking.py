"""How the commands speak: whatever the terminal's encoding, and of bad input in one message."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper

from core.errors import InputError


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
