"""Where the features of a data set are kept: on a GPU while they are few, else on the host."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from ..data.rows import free_memory, host_memory

ON_DEVICE = 2 << 30  # bytes of features on a GPU: a million rows of 512; else the host has them
_OF_HOST = 4  # and one part in so many of the host's memory is the most they take


def of_host() -> int:
    """Bytes of the host's memory that a process may give to features."""
    return host_memory() // _OF_HOST // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def bank(shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    """Room for features like these, whose values are undefined; None where there is none."""
    needed = math.prod(shape) * like.element_size()
    if like.is_cuda and needed <= min(ON_DEVICE, free_memory(like.device) // 4):
        return like.new_empty(shape)
    if needed > of_host():
        return None
    return torch.empty(shape, dtype=like.dtype, device="cpu")


def looked_up(
    kept: Tensor,  # [n, D] on the device or the host
    rows: Tensor,  # [b] int64
    device: torch.device,
) -> Tensor:
    """[b, D] on the device, from the host by way of page-locked memory."""
    if kept.is_cuda:
        return kept[rows.to(device, non_blocking=True)]
    found = kept.new_empty((len(rows), kept.shape[1]))
    if device.type == "cuda":
        found = found.pin_memory()
    torch.index_select(kept, 0, rows.cpu(), out=found)
    return found.to(device, non_blocking=True)
