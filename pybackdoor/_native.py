"""Loads the native module, or says what to run."""

from __future__ import annotations

import math
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

__all__ = ["_C", "cuda_status", "empty", "sent"]

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
    return torch.empty(0, dtype=dtype, device="cpu").set_(flat.untyped_storage(), 0, tuple(shape))


def sent(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x on the device, without waiting for what a GPU still has to do.

    That takes page-locked memory in one piece: what has none, or was cut, is copied there first.
    What comes from a GPU is waited for.
    """
    if device.type == "cuda" and not x.is_cuda:
        whole = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
        if not whole or not x.is_pinned():
            x = torch.empty_like(x, pin_memory=True).copy_(x)
    return x.to(device, non_blocking=device.type == "cuda")


def has_code_for(archs: str, capability: int) -> bool:
    """Whether a build for `archs` ("80;90+PTX") runs on a device of a capability (89 for 8.9).

    A binary runs on later minor revisions of its major one, the last one's PTX on all later ones.
    """
    built = [int(arch) for arch in archs.removesuffix("+PTX").split(";")]
    if capability >= built[-1]:
        return True
    return any(a // 10 == capability // 10 and a <= capability for a in built)


@cache
def cuda_status(index: int = 0) -> str | None:
    """Why the native CUDA kernels cannot run on CUDA device `index`; None if they can."""
    obstacle = _C.cuda_obstacle()
    if not obstacle:
        capability = _C.cuda_capability(index)
        if not has_code_for(_C.cuda_archs, capability):
            archs = _C.cuda_archs.removesuffix("+PTX")
            obstacle = f"it is built for sm_{archs}, this device is sm_{capability}"
    return f"not available, because {obstacle}" if obstacle else None
