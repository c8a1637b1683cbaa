"""Several processes of one command on this machine: they share the study's cells by their claims."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import torch

from core.errors import InputError

PATIENCE = 60.0  # seconds to leave in good order


def command(*more: str) -> list[str]:
    """This process's command line, with more; what is done at once at the beginning is not done again."""
    return [sys.executable, *(word for word in sys.orig_argv[1:] if word.replace("_", "-") != "--retry-failed"), *more]


def suggested() -> int:
    """Processes for cells that do not fill several threads: one a thread, at most 8; 1 in a program that only calls the
    command, and could not be started again for a worker."""
    script = Path(sys.orig_argv[1]).name if len(sys.orig_argv) > 1 else ""
    return min(torch.get_num_threads(), 8) if script in ("run.py", "vit-ablations") else 1


def divide_threads(jobs: int, device: str) -> None:
    """Give this process its part of the machine's threads. InputError for fewer threads than processes on a CPU: they
    would stand in each other's way."""
    threads = torch.get_num_threads()
    if jobs > threads and device == "cpu":
        raise InputError(f"{jobs} jobs would share {threads} threads (a CPU's cores, or OMP_NUM_THREADS); pass fewer")
    torch.set_num_threads(max(1, threads // jobs))


@contextmanager
def workers(count: int, note: Callable[[str], None], *more: str) -> Iterator[None]:
    """So many other processes of this command, a GPU each where there are several; waits for them, and after an error
    ends them in good order."""
    processes = [subprocess.Popen(command("--worker", *more), env=_environment(i + 1)) for i in range(count)]
    try:
        yield
    except BaseException:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        raise
    finally:
        for process in processes:
            try:
                status = process.wait(PATIENCE if sys.exception() else None)
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
            if status not in (0, 1) and not sys.exception():
                note(f"a worker ended with status {status}; its cells went to the others")


def follow_parent() -> None:
    """Have this process told to end when the one that started it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=watch, daemon=True).start()


def _environment(index: int) -> dict[str, str]:
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    count = torch.cuda.device_count()
    if count > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(count)]
        environment["CUDA_VISIBLE_DEVICES"] = names[index % count]
    return environment
