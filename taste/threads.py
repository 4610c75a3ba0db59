"""Keeps torch's number of threads where other code changes it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Give torch back, at the end of the block, the number of threads it has now.

    Parallel functions of numba set it to the number of cores, whatever OMP_NUM_THREADS or the caller said; where the
    cores are shared, every small operation of torch then waits for threads that have no core.

    Yields:
        nothing.
    """
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
