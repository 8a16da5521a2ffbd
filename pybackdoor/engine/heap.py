"""glibc's malloc during a run on a CPU: freed memory is kept and used again.

By itself it returns every block of 32 MiB or more to the system as soon as it is freed, and the top
of its heap likewise; a training step then begins with fresh pages, which the system clears one by
one. The results are the same bit for bit.
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of malloc.h
_LARGEST_THRESHOLD = 32 << 20  # what glibc's own, which follows the blocks freed, ends at

_lock = threading.Lock()
_runs = 0


@contextmanager
def kept_heap(device: torch.device) -> Iterator[None]:
    """Within, freed memory stays with the process; at the end of the last run it goes back.

    Nothing changes on another device, with another C library, or where the environment has settings
    of malloc's (MALLOC_*_, GLIBC_TUNABLES): the user's hold. Afterwards the thresholds are fixed at
    those glibc's own reach in a process that has freed a block of 32 MiB.
    """
    libc = _glibc()
    if libc is None or device.type != "cpu":
        yield
        return
    _count(libc, 1)
    try:
        yield
    finally:
        _count(libc, -1)


def _count(libc: ctypes.CDLL, change: int) -> None:
    global _runs
    with _lock:
        before, _runs = _runs, _runs + change
        if before == 0:
            libc.mallopt(_MMAP_MAX, 0)
            libc.mallopt(_TRIM_THRESHOLD, -1)  # never
        elif _runs == 0:
            libc.mallopt(_MMAP_MAX, 65536)
            libc.mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
            libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD)
            libc.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    own = [name for name in os.environ if name.startswith("MALLOC_") and name.endswith("_")]
    if own or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    if platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    libc.malloc_trim.argtypes = [ctypes.c_size_t]
    return libc
