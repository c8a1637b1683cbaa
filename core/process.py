"""What is set for the whole process, and set back."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch


@contextmanager
def as_it_was() -> Iterator[None]:
    """What code of a user's sets for the whole process is set back: no other arm, and no option, is another for it.
    Also a decorator."""
    words, streams, depth = [*sys.argv], (sys.stdout, sys.stderr), sys.getrecursionlimit()
    dtype, gradients, threads = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    device, exact = torch.get_default_device(), torch.are_deterministic_algorithms_enabled()
    folder = None
    with suppress(OSError):  # it is gone
        folder = os.getcwd()
    try:
        yield
    finally:
        sys.argv[:] = words
        sys.stdout, sys.stderr = streams
        sys.setrecursionlimit(depth)
        if folder is not None:
            os.chdir(folder)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)
        if torch.are_deterministic_algorithms_enabled() != exact:
            torch.use_deterministic_algorithms(exact)
