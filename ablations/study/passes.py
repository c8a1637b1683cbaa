"""What needs a machine to itself: the timing pass and the profiles."""

import errno
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ablations.study import claims, profiling, timing
from ablations.study.arms import BASELINE
from ablations.study.cells import Prepared
from ablations.study.progress import Terminal
from ablations.study.store import Result, profile_folder, write_json
from core import process, rng


def timing_claim(out: Path) -> Path:
    """What a process claims to have this machine to itself."""
    return out / f"timing-{claims.host().partition(' ')[0].replace('/', '_')}"


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """This machine to oneself: waits until no process here has a cell of the study, and lets none begin one."""
    with claims.waited(timing_claim(out)):
        claims.wait(lambda: claims.working_here(out))
        yield


@process.as_it_was()
def measured(
    cells: Sequence[Prepared], made_by: Result, out: Path, progress: Terminal, timing_only: bool, profiled: bool
) -> int:
    """What needs the machine alone: the timing pass, where there is none of all arms yet or it is asked for, and the
    profiles; returns how many arms failed there."""
    if not profiled and not timing_due(cells, out, timing_only):
        claims.clear(timing_claim(out))
        return 0
    failed = 0
    with alone(out):
        if timing_due(cells, out, timing_only):
            failed += timing.measure_arms(cells, made_by, out, progress, asked=timing_only)
        return failed + (profile(cells, made_by, out, progress) if profiled else 0)


def timing_due(cells: Sequence[Prepared], out: Path, asked: bool) -> bool:
    """Whether there is a timing pass to make."""
    timed = BASELINE in (cell.arm.name for cell in cells)
    return asked or (timed and not timing.complete(out, cells))


def profile(cells: Sequence[Prepared], made_by: Result, out: Path, progress: Terminal) -> int:
    """A pass of its own over each arm's step (see profiling.py), where there is none yet; returns how many failed. Of
    the engine graphed it shows the compiled step that the graph replays."""
    failed = 0
    for cell in cells:
        name = cell.arm.name
        folder = profile_folder(out, name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "failed.json").unlink(missing_ok=True)
        try:
            if not profiling.finished(folder):
                state = cell.start(0, rng.key(0, cell.device))
                batch = cell.batch(cell.recipe.batch_size)
                profiling.profile(cell.step, state, batch, folder, name, made_by=made_by)
            progress.note(f"profile of {name}: {folder / 'profile.json'}")
        except (Exception, SystemExit) as error:  # recorded and counted; the other arms go on
            failed += 1
            write_json(folder / "failed.json", {"arm": name, **failure(error)})
            progress.note(f"profile of {name}: failed: {failure(error)['error']}")
    return failed


def failure(error: BaseException) -> Result:
    """What is recorded of an error."""
    return {"error": f"{type(error).__name__}: {error}", "traceback": "".join(traceback.format_exception(error))}


def full(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is that of a full disk."""
    while error is not None:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
