"""glibc's malloc during a run on a CPU: freed memory is kept and used again.

By itself it returns every block of some 32 MiB or more to the system as soon as it is freed, and
the top of its heap likewise; a training step then begins with fresh pages, which the system clears
one by one. What is computed stays the same bit for bit.
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
_MANY = 65536  # glibc's own M_MMAP_MAX
_LARGEST = 32 << 20  # M_MMAP_THRESHOLD can be no more, hence M_MMAP_MAX of 0 during a run

_runs = 0


@contextmanager
def kept_heap(device: torch.device) -> Iterator[None]:
    """Within, freed memory stays with the process; at the end of the outermost block it goes back.

    Nothing changes on another device, with another C library, in another thread than the main one
    (whose heap alone can hold large blocks), or where the environment has settings of malloc's
    (``MALLOC_*_``, ``GLIBC_TUNABLES``): the user's hold. Afterwards blocks from 32 MiB on are
    returned as they are freed, and the top of the heap from 64 MiB on, as glibc comes to do by
    itself in a process that frees blocks of nearly that size.
    """
    global _runs
    main = threading.current_thread() is threading.main_thread()
    libc = _glibc() if main and device.type == "cpu" else None
    if libc is None:
        yield
        return
    _runs += 1
    try:
        if _runs == 1:
            libc.mallopt(_MMAP_MAX, 0)
            libc.mallopt(_TRIM_THRESHOLD, -1)  # never
        yield
    finally:
        _runs -= 1
        if _runs == 0:
            _let_go(libc)
            libc.malloc_trim(0)


def _let_go(libc: ctypes.CDLL) -> None:
    libc.mallopt(_MMAP_MAX, _MANY)
    libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
    libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)


def _let_go_in_child() -> None:
    """A forked child, as a loader's worker is, is in no run."""
    global _runs
    libc = _glibc() if _runs else None
    if libc is not None:
        _let_go(libc)
    _runs = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


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
