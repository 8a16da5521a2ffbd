"""The terms that cleaning objectives are made of, in plain PyTorch.

Features are unit rows; every term is computed in at least fp32, whatever the towers ran in.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def contrastive_loss(
    image: Tensor,  # [N, D] unit rows
    text: Tensor,  # [N, D] unit rows, row n the caption of image n
    scale: Tensor,  # [] exp(logit_scale)
) -> Tensor:
    """CLIP's symmetric InfoNCE, ½[CE(s·ΦΨᵀ, I) + CE(s·ΨΦᵀ, I)] (arXiv 2103.00020, figure 3).

    Returns:
        [] at least fp32; 0 for N = 1, where no negative exists.
    """
    image, text = _at_least_fp32(image), _at_least_fp32(text)
    logits = scale.to(image.dtype) * image @ text.T  # [N, N]
    target = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def mean_squared_distance(
    a: Tensor,  # [N, D] unit rows, receives the gradient
    b: Tensor,  # [N, D] unit rows
) -> Tensor:
    """S = meanₙ‖aₙ − bₙ‖², in [0, 4] for unit rows; summed over D, not divided by it.

    The difference is squared directly: 2 − 2·cos would cancel where a is close to b.
    """
    return (_at_least_fp32(a) - _at_least_fp32(b)).square().sum(-1).mean()


def gate(distance: Tensor, tau: float) -> Tensor:
    """``distance`` while it is at most tau, else 0 with a zero gradient (arXiv 2412.00727).

    Decided on the device, from the mean of the whole batch.
    """
    return torch.where(distance <= tau, distance, torch.zeros_like(distance))


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
