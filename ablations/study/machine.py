"""The machine: which device a study uses, how exactly it computes, and what it is called in the record."""

import ctypes
import os
import platform
import subprocess
from pathlib import Path

import torch

from core.errors import InputError, choose

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of malloc.h
PATIENCE = 10.0  # seconds for git's answer
DEVICES = ("auto", "cpu", "cuda")
COMPARABLE = ("torch", "device_name", "threads")  # cells that differ in one of these cannot be compared


def named(device: str, present: bool = True) -> str:
    """cpu or cuda. InputError for an unknown device, and if it must be present for one that is not here."""
    choose("device", device, DEVICES)
    available = torch.cuda.is_available()
    if device == "cuda" and present and not available:
        raise InputError("device 'cuda' is not available here: pass --device cpu, or install a CUDA build of torch")
    return ("cuda" if available else "cpu") if device == "auto" else device


def ready(device: str) -> torch.device:
    """The device, with float32 as float32 on it (no TF32 in matrix products and convolutions) and, on a CPU with glibc,
    the memory kept that a step lets go of: fetching it again, page by page, took a twentieth of the next one.
    """
    if device == "cpu" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return torch.device(device)


def deterministic() -> None:
    """Have torch use deterministic algorithms alone; an operation without one raises a RuntimeError that names it."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)


def environment(device: str) -> dict[str, str]:
    """Versions, hardware and source revision."""
    git = ["git", "-C", str(Path(__file__).parents[2]), "--git-dir", ".git"]  # not of what it is installed within
    git += ["describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(git, capture_output=True, check=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)
        revision = done.stdout.decode(errors="replace").strip()
    except (OSError, subprocess.SubprocessError):
        revision = "unknown"
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "device_name": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": str(torch.get_num_threads()),
        "revision": revision,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
