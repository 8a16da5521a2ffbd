"""Loads the native module, or says what to run; and tells what was built."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import cache

import torch

try:
    from pybackdoor import _C
except ImportError as error:
    raise ImportError(
        "pybackdoor: the native module pybackdoor._C cannot be loaded "
        f"({error}). If you import from the source tree, run `pip install -e .` "
        "(or `python setup.py build_ext --inplace`) there first; else reinstall pybackdoor."
    ) from error

__all__ = ["_C", "build_info", "cuda_status", "empty"]


POOL_FROM = 4 << 20  # bytes; below, malloc keeps freed memory by itself


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """torch.empty, contiguous; large results on the CPU come from memory that is used again.

    Up to 512 MiB of freed results are kept for it (`_C.empty_pool` gives them back).
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < POOL_FROM:
        return torch.empty(shape, dtype=dtype, device=device)
    flat = torch.frombuffer(_C.Buffer(size), dtype=dtype)
    # set_ makes a tensor of its own; a view made here could not be changed in place under autograd.
    return torch.empty(0, dtype=dtype).set_(flat.untyped_storage(), 0, tuple(shape))


@cache
def cuda_status() -> str | None:
    """Why the native CUDA kernels cannot run here; None if they can."""
    obstacle = _C.cuda_obstacle()
    return f"not available, because {obstacle}" if obstacle else None


def build_info() -> dict:
    """What was built, what this machine can run, and the backend each op takes.

    Returns:
        version, compiler; isa_built, isa_usable, isa (the CPU instruction sets compiled in, those
        that run here, the one taken); openmp (the runtime shared with torch); built_with_cuda,
        cuda_archs, cuda (None, or why it is not available); ops: {op: {device type: {backend,
        reason}}}.
    Example:
        >>> build_info()["ops"]["trigger_normalize"]["cpu"]["backend"]
        'cpu'
    """
    from pybackdoor import _backend

    ops = {}
    for op in sorted(_backend.NATIVE_CPU | _backend.NATIVE_CUDA | _backend.TRITON):
        ops[op] = {}
        for device in ("cpu", "cuda"):
            try:
                choice = _backend.choose(torch.device(device), op, warn=False)
            except (RuntimeError, ValueError) as error:
                choice = _backend.Choice("none", str(error))
            ops[op][device] = {"backend": choice.name, "reason": choice.reason}
    return {
        "version": _C.version,
        "compiler": _C.compiler,
        "isa_built": list(_C.isas_built),
        "isa_usable": list(_C.isas()),
        "isa": os.environ.get("PYBACKDOOR_CPU_ISA") or _C.isas()[0],
        "openmp": _C.parallel_runtime() or "none: plain threads",
        "built_with_cuda": _C.built_with_cuda,
        "cuda_archs": _C.cuda_archs,
        "cuda": cuda_status(),
        "ops": ops,
    }
