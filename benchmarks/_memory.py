"""Peak memory: of the process on a CPU, of torch's allocator on CUDA."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


def release_memory() -> None:
    """Gives freed memory back to the system, so that no setting starts on another's warm pages."""
    gc.collect()
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
        if trim is not None:
            trim(0)


def status_bytes(field: str) -> int:
    """A field of the process's status, VmRSS or VmHWM, in bytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {field}")


def peak_growth(call: Callable[[], object], device: str) -> int:
    """Bytes by which the peak rises above what is in use before the call.

    CPU: resident pages. The high-water mark is set back first; where the system forbids that, it
    is right only in a process that has not yet used more than now, a fresh one.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    release_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    before = status_bytes("VmRSS")
    call()
    return status_bytes("VmHWM") - before


def available_bytes() -> int:
    """What the system, or this process's control group, can still give."""
    info = Path("/proc/meminfo").read_text().splitlines()
    free = [int(line.split()[1]) * 1024 for line in info if line.startswith("MemAvailable:")]
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        free.append(limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        pass
    return min(free)


def _child(pipe, function, arguments) -> None:
    try:
        pipe.send(("value", function(*arguments)))
    except Exception as error:
        pipe.send(("error", f"{type(error).__name__}: {error}"))


def in_fresh_process(function: Callable, *arguments, timeout: float = 600):
    """function(*arguments) in a new interpreter; both must be importable and picklable.

    Raises:
        RuntimeError: it raised, was killed (out of memory, most often) or outlasted the timeout.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, function, arguments))
    process.start()
    there.close()
    try:
        if not here.poll(timeout):
            raise RuntimeError(f"no result within {timeout:g} s")
        kind, value = here.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process died with exit code {process.exitcode}") from None
    finally:
        if process.is_alive():
            process.join(5)
        if process.is_alive():
            process.kill()
        process.join()
    if kind == "error":
        raise RuntimeError(value)
    return value
