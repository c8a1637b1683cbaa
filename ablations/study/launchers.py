"""Where a study's tasks go (orders.py): a Ray cluster, or an array of Slurm jobs."""

import logging
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from threading import Timer
from types import FrameType
from typing import Any

from ablations.study import jobs
from ablations.study.orders import Job, Order, Send, perform
from core.errors import InputError, choose

LAUNCHERS = ("here", "ray", "slurm")
CLUSTERS = ("slurm", "local", "debug")  # of submitit: jobs, processes of this machine, and this process
ANSWER, JOIN = 10.0, 60.0  # seconds within which an address must answer, and a Ray cluster must take this process
HOUR = 60  # minutes of a Slurm job, unless given; one whose time is over is queued again, and goes on


def launched(name: str, order: Order, address: str, settings: Sequence[str]) -> AbstractContextManager[Send]:
    """What sends an order's tasks to a launcher; ended with an error, it calls back what it has sent.

    InputError for a device that is not named, a package that is missing, an address that nobody answers, machines that
    are too small, and settings that Slurm does not know.
    """
    package = {"ray": "ray", "slurm": "submitit"}[name]
    if find_spec(package) is None:
        raise InputError(f"--launcher {name} needs the package {package}: pip install 'vit-ablations[{name}]'")
    if order.recipe.device == "auto":
        raise InputError(f"--launcher {name} cannot see what the machines have: pass --device cuda or --device cpu")
    if name == "ray":
        return _ray(order, address)
    return _slurm(order, read_settings(settings))


def read_settings(words: Sequence[str]) -> dict[str, str | int]:
    """("partition=gpu", "time=240") -> {"partition": "gpu", "time": 240}; InputError for what is no NAME=VALUE, a name
    twice, and numbers that are out of their range."""
    found: dict[str, str | int] = {}
    for word in words:
        name, _, value = word.partition("=")
        if not re.fullmatch(r"[a-z]+(_[a-z]+)*", name) or not value.strip():
            raise InputError(f"--slurm '{word}' is no NAME=VALUE; write for example partition=gpu")
        if name in found:
            raise InputError(f"--slurm has {name} twice; write it once")
        number = re.fullmatch(r"0|[1-9][0-9]*", value)  # not a name such as 007
        if number and len(value) > 9:
            raise InputError(f"--slurm {word} is too large a number: at most 9 digits")
        found[name] = int(value) if number else value
    if not isinstance(minutes := found.setdefault("time", HOUR), int) or not minutes:
        raise InputError(f"--slurm time={minutes} is no number of minutes; write time=240 for four hours")
    choose("--slurm cluster", str(found.get("cluster", "slurm")), CLUSTERS)
    return found


@contextmanager
def _ray(order: Order, address: str) -> Iterator[Send]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    where: dict[str, Any] = {"address": address} if address else {"include_dashboard": False}
    if address:
        _answers(address)
    term = signal.getsignal(signal.SIGTERM)  # which Ray takes
    limit = Timer(JOIN, _give_up, [address or "of this machine"])
    limit.start()
    try:
        ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"Ray at '{address or 'this machine'}' cannot be used: {error} (one with tokens needs RAY_AUTH_MODE=token)"
        ) from error
    finally:
        limit.cancel()
    signal.signal(signal.SIGTERM, term)
    sent: dict[Any, Job] = {}
    try:
        resources: dict[str, Any] = {"num_cpus": order.threads, "num_gpus": int(order.recipe.device == "cuda")}
        _fits(resources, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        task: Any = ray.remote(perform).options(max_retries=0, **resources)

        def send(calls: Sequence[tuple[object, ...]]) -> list[Job]:
            new = {ref: ref.future() for ref in [task.remote(*call) for call in calls]}
            sent.update(new)
            return list(new.values())

        try:
            yield send
        except BaseException:
            for ref in sent:
                ray.cancel(ref)
            _wait(sent.values())
            raise
    finally:
        ray.shutdown()


def _wait(sent: Collection[Job]) -> None:
    """Until all that was called back has ended: at a snapshot."""
    end = time.monotonic() + jobs.PATIENCE
    while not all(job.done() for job in sent) and time.monotonic() < end:
        time.sleep(0.1)


def _give_up(address: str) -> None:
    """End this process, which waits in Ray's own code for what listens and is no Ray cluster."""
    print(f"error: no Ray cluster at '{address}' within {JOIN:.0f} s: --ray-address?", file=sys.stderr, flush=True)
    os._exit(2)


def _answers(address: str) -> None:
    """InputError for an address without a port, or that nothing listens at."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(f"--ray-address '{address}' is no HOST:PORT; ray start --head prints it (port 6379)")
    try:
        socket.create_connection((host, int(port)), ANSWER).close()
    except (OSError, OverflowError, UnicodeError) as error:  # the last: of no name of a machine
        raise InputError(f"nobody answers at --ray-address {address} ({error}); start one: ray start --head") from error


def _fits(needed: dict[str, Any], nodes: Sequence[dict[str, float]]) -> None:
    """InputError if no machine of a cluster has what a task needs: it would wait for ever."""
    cpus, gpus = needed.values()
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        have = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes) or "nothing"
        raise InputError(f"a cell takes {cpus} CPUs and {gpus} GPUs, and the cluster's machines have {have}")


@contextmanager
def _slurm(order: Order, settings: dict[str, str | int]) -> Iterator[Send]:
    import submitit

    cluster = str(settings.pop("cluster", "slurm"))
    missing = [name for name in ("sbatch", "srun") if not shutil.which(name)]
    if cluster == "slurm" and missing:
        raise InputError(f"there is no Slurm here ({missing[0]} is not found); call where jobs can be submitted")
    logs = order.out.with_name(f"{order.out.name}.slurm")
    executor = submitit.AutoExecutor(logs, cluster, slurm_max_num_timeout=10**6)
    try:
        executor.update_parameters(
            name="vit-ablations",
            timeout_min=settings.pop("time"),
            cpus_per_task=order.threads,
            gpus_per_node=int(order.recipe.device == "cuda"),
            **{f"slurm_{name}": value for name, value in settings.items()},
        )
    except (NameError, TypeError, ValueError) as error:
        with suppress(OSError):
            logs.rmdir()  # unless there are any of before
        raise InputError(f"--slurm {' '.join(f'{k}={v}' for k, v in settings.items())}: {error}") from error
    sent: list[submitit.Job[str | None]] = []

    def send(calls: Sequence[tuple[object, ...]]) -> list[Job]:
        try:
            new = executor.map_array(_Resumable(perform), *zip(*calls, strict=True)) if calls else []
        except (submitit.core.utils.FailedJobError, TypeError) as error:
            raise InputError(f"Slurm takes no job: {error}") from error
        sent.extend(new)
        return list(new)

    try:
        yield send
    except BaseException:
        for job in sent:
            job.cancel(check=False)
        _wait(sent)
        raise


class _Requeued(KeyboardInterrupt):
    """The job's time is over: what it does ends here, and has not failed."""


@dataclass(frozen=True)
class _Resumable:
    """A function that submitit calls again, in a new job, when the job's time is over."""

    function: Callable[..., str | None]

    def __call__(self, *arguments: Any) -> str | None:
        requeue: Any = signal.getsignal(signal.SIGUSR2)  # submitit's, which exits: an arm that exits has failed

        def hear(number: int, frame: FrameType | None) -> None:
            try:
                requeue(number, frame)
            except SystemExit as end:
                raise _Requeued(end.code) from None

        signal.signal(signal.SIGUSR2, hear)
        try:
            return self.function(*arguments)
        except _Requeued as end:
            sys.exit(end.args[0])

    def checkpoint(self, *arguments: Any) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *arguments)
