"""Tells what was built and what runs here."""

from __future__ import annotations

import os

import torch

from pybackdoor import _backend
from pybackdoor._native import _C, cuda_status


def build_info() -> dict:
    """What was built, what this machine can run, and the backend each op takes.

    Returns:
        version, compiler; isa_built, isa_usable, isa (the CPU instruction sets compiled in, those
        that run here, the one taken); openmp (the runtime shared with torch); built_with_cuda,
        cuda_archs, cuda (None, or why it is not available on
        the first device); ops: {op: {device type: {backend,
        reason}}}.
    Example:
        >>> build_info()["ops"]["trigger_normalize"]["cpu"]["backend"]
        'cpu'
    """
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
