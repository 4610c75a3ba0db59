"""Asks the kernel for all of a memory-mapped tensor at once, which would else come in small pieces, each waited for."""

import ctypes
import mmap
import sys
from collections.abc import Callable
from functools import cache

from torch import Tensor

PIECE_BYTES = 128 * 1024  # most that the kernel takes on at one request, where nobody has changed its read-ahead


def read_ahead(values: Tensor) -> None:
    """Let the kernel begin to read what a tensor of a memory-mapped file holds; anything else is left as it is.

    Args:
        values: about to be read, on the CPU.
    """
    advise = _madvise()
    if advise is None or not values.is_contiguous():
        return
    end = values.data_ptr() + values.nbytes
    for start in range(values.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE, end, PIECE_BYTES):
        advise(start, min(PIECE_BYTES, end - start), mmap.MADV_WILLNEED)  # advice: where it fails, nothing is lost


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The system call, which Python has only for mappings of its own; None where there is none."""
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
