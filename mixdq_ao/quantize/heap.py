"""Memory given back to the system while a model is quantized layer by layer: what is freed, and pages of files.

Weights of some megabytes lie in the allocator's heap, where the packed codes that stay lie between those that are
freed: glibc keeps such holes. Quantizing SDXL's UNet in place left a process of 4.6 GB around 1.3 GB of weights. With
80 layers of 3.3 MB each, quantized to 4 bits, the most held fell from 4.3 to 2.4 times the weights (float32 ones, from
which they were made, were lying about too).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

from torch import Tensor

EVERY = 64 << 20
"""Bytes of weights between two times."""
PAGEOUT = 21
"""MADV_PAGEOUT of Linux 5.4: pages of a file are dropped and read again when needed; nothing is ever lost."""

_seen = 0


def give_back_after(weight: Tensor) -> None:
    """To be called for each weight that is quantized; from time to time frees what the allocator holds and nobody uses.

    Nothing where the C library has no ``malloc_trim`` or the weight is not in this machine's memory.
    """
    global _seen
    if weight.device.type != "cpu":
        return
    _seen += weight.numel() * weight.element_size()
    if _seen >= EVERY:
        _seen = 0
        trim = _malloc_trim()
        if trim is not None:
            trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


def page_out(weight: Tensor) -> None:
    """Drops the pages of a weight that lies in a mapped file and has been read for the last time, so that they do not
    add up to the whole file. It may be read again all the same; nothing happens elsewhere than on Linux."""
    if weight.device.type != "cpu" or not weight.is_contiguous():
        return
    start = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (weight.data_ptr() + weight.numel() * weight.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    advise = _madvise()
    if advise is not None and end > start:
        advise(start, end - start, PAGEOUT)  # an older kernel answers that it cannot, which is as well


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    try:
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):
        return None
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise
