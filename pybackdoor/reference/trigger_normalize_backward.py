"""The gradients of the ops in plain PyTorch, without autograd: what the last backend runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from pybackdoor.reference.trigger_normalize import (
    _erase_,
    _mix,
    _strengths,
    _windows,
    augment_decisions,
    levels,
)

if TYPE_CHECKING:
    from pybackdoor.ops._trigger_table import Augment, TriggerTable


def trigger_normalize_backward(
    grad: Tensor,
    images: Tensor,
    *,
    std: tuple[float, float, float],
    triggers: TriggerTable,
    trigger_id: Tensor | None = None,
    position: Tensor | None = None,
    strength: Tensor | float | None = None,
    augment: Augment | None = None,
    seed: int = 0,
    view: int = 0,
    sample_id: Tensor | None = None,
    input_layout: str = "nhwc",
    layout: str = "nchw",
    patch_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of trigger_normalize in pattern and mask, without autograd.

    Those of the unquantised values, zero where the clip holds them and where a square is erased.

    Args:
        grad: dL/d(output), as the output is.
    Returns:
        Like triggers.pattern and triggers.mask; None without a mask.
    """
    x = images if input_layout == "nhwc" else images.permute(0, 2, 3, 1)
    (batch, height, width), pattern, mask = x.shape[:3], triggers.pattern, triggers.mask
    grad = grad.float()
    if layout == "patchified":
        p = patch_size
        grad = grad.reshape(batch, height // p, width // p, 3, p, p).permute(0, 3, 1, 4, 2, 5)
        grad = grad.reshape(batch, 3, height, width)
    if augment is not None:
        decided = augment_decisions(augment, seed, view, sample_id, (height, width))
        grad = _erase_(grad.clone(), decided[1])
    u = grad.permute(0, 2, 3, 1) / torch.tensor(std, dtype=torch.float32, device=grad.device)
    chosen, which, index = _windows(x, triggers, trigger_id, position)
    u = F.pad(u, (0, 0, 0, 1, 0, 1))[index]
    x = levels(x.device)[F.pad(x, (0, 0, 0, 1, 0, 1))[index].int()]
    s = _strengths(None if triggers.mode == "patch" else strength, images)[chosen]
    if triggers.clip:
        value = _mix(x, triggers, which, s)
        u = torch.where((value >= 0) & (value <= 1), u, 0)
    u = s.float() * u

    def total(terms: Tensor) -> Tensor:  # [n, h, w, 3] -> [T, 3, h, w]
        sums = [terms[which == k].sum(0) for k in range(len(pattern))]
        sums = torch.stack(sums).permute(0, 3, 1, 2)
        return torch.where(pattern != 0, sums, 0) if triggers.nonzero_only else sums

    g0 = total(u)
    if mask is None:
        return g0.contiguous(), None
    d_mask = pattern * g0
    if not triggers.additive:
        d_mask = d_mask - total(u * x)
    if mask.shape[1] == 1:
        d_mask = d_mask.sum(1, keepdim=True)
    return (mask * g0).contiguous(), d_mask.contiguous()
