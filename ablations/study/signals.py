"""Leaving in good order: SIGINT, SIGTERM and the end of the time let a step finish and its snapshot be written."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


class Stopped(KeyboardInterrupt):
    """The study was told to end: by a signal, or by SIGALRM as its time is over."""

    def __init__(self, number: int) -> None:
        super().__init__("the time is over" if number == signal.SIGALRM else signal.Signals(number).name)
        self.number = number

    @property
    def status(self) -> int:
        """What the process ends with: 130 and 143 by signal, 75 (try again later) after the time."""
        return os.EX_TEMPFAIL if self.number == signal.SIGALRM else 128 + self.number


class Stop:
    """Whether to end. A signal raises Stopped at once; within `finishing`, at its end."""

    def __init__(self) -> None:
        self.number = 0
        self._finishing = False

    @contextmanager
    def listening(self, minutes: float | None = None) -> Iterator[None]:
        """Take the signals, and SIGALRM after so many minutes. A second SIGINT is left to the system: it ends the
        process at once, whatever that does."""
        before = {number: signal.signal(number, self._heard) for number in NUMBERS}
        signal.setitimer(signal.ITIMER_REAL, 60 * (minutes or 0))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Work that ends soon after `number` is set, and is not to be torn."""
        self.check()
        self._finishing = True
        try:
            yield
        finally:
            self._finishing = False
        self.check()

    def check(self) -> None:
        """Stopped, if told to end."""
        if self.number:
            raise Stopped(self.number)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.number:
            return
        self.number = number
        show = b"\x1b[?25h" if os.isatty(1) else b""  # the cursor, which a second SIGINT would leave hidden
        with suppress(OSError):  # nobody reads any more
            os.write(2, show + f"\n{Stopped(number)}: leaving at a checkpoint; Ctrl-C again leaves at once\n".encode())
        if not self._finishing:
            self.check()


def take_minutes() -> float | None:
    """Until SIGALRM, which does not come any more: a process in the place of this one would end by it without a word.
    None if there is none to come."""
    return signal.setitimer(signal.ITIMER_REAL, 0)[0] / 60 or None
