"""Being told to end: at once, or at the end of what must not be torn."""

import os
import signal
import time
from contextlib import nullcontext

import pytest

from ablations.study import running
from ablations.study.signals import Stop, Stopped, take_minutes


def told(stop, number, finishing, reached):
    with stop.listening():
        with stop.finishing() if finishing else nullcontext():
            os.kill(os.getpid(), number)
            reached.append(signal.getsignal(signal.SIGINT))
        reached.append("never")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGALRM, 75)])
@pytest.mark.parametrize("finishing", [False, True])
def test_a_signal_raises_at_once_or_after_what_is_finishing(number, status, finishing, capfd):
    """The second interrupt is the system's, which ends the process whatever it does."""
    before, reached = signal.getsignal(signal.SIGINT), []
    with pytest.raises(Stopped) as stopped:
        told(Stop(), number, finishing, reached)
    assert stopped.value.status == status
    assert reached == ([signal.SIG_DFL] if finishing else [])
    assert "leaving at a checkpoint" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) == before


def test_told_once_nothing_begins_any_more(tmp_path):
    stop, reached = Stop(), []
    with pytest.raises(Stopped):
        told(stop, signal.SIGTERM, False, reached)
    with pytest.raises(Stopped), stop.finishing():
        reached.append("never")
    assert reached == []
    with pytest.raises(Stopped):  # also where the cell that heard it was lost to another process, or failed
        running.run([], {}, tmp_path, None, stop)


def test_the_time_is_over():
    with pytest.raises(Stopped, match="the time is over"), Stop().listening(minutes=0.05 / 60):
        time.sleep(5)


def test_time_that_is_left_to_another_process_does_not_end_it():
    with Stop().listening(minutes=1):
        assert 0.9 < take_minutes() <= 1
        assert take_minutes() is None
    assert take_minutes() is None
