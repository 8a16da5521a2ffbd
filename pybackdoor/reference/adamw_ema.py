"""adamw_ema in plain eager PyTorch, as a user would write it; any device, fp32 or fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pybackdoor.reference.trigger_normalize import philox_uint32

if TYPE_CHECKING:
    from pybackdoor.ops._adamw_ema_table import Group, Options, Slot

STREAM_WEIGHTS = 2


def weight_noise(seed: int, tensor_id: int, step: int, numel: int, device: torch.device) -> Tensor:
    """Standard normal numbers for the weights of a tensor, by Box-Muller, computed in fp64.

    Element i, in the order of memory, takes number i % 4 of the Philox block with counter
    (i // 4, 2, tensor_id, step); see `reference.noise_normals` for the numbers of a block.

    Returns:
        [numel] fp64.
    """
    blocks = torch.arange((numel + 3) // 4, device=device)
    sample = torch.tensor([tensor_id | step << 32], device=device)
    pairs = (philox_uint32(seed, STREAM_WEIGHTS, 0, sample, blocks) >> 8).double().view(-1, 2)
    radius = ((pairs[:, 0] + 1) * 2.0**-24).log().mul(-2).sqrt()
    angle = pairs[:, 1] * (2 * math.pi * 2.0**-24)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1).flatten()[:numel]


def _adamw_eager(group: Group, slots: list[Slot], grads: list[Tensor]) -> None:
    lr = group.lr.double() if isinstance(group.lr, Tensor) else group.lr
    for slot, grad in zip(slots, grads, strict=True):
        slot.step.add_(1)
        step = slot.step.double()
        slot.param.mul_(1 - lr * group.weight_decay)
        slot.exp_avg.lerp_(grad, 1 - group.beta1)
        slot.exp_avg_sq.mul_(group.beta2).addcmul_(grad, grad, value=1 - group.beta2)
        bias2_sqrt = (1 - group.beta2**step).sqrt().to(grad.dtype)
        denominator = (slot.exp_avg_sq.sqrt() / bias2_sqrt).add_(group.eps)
        step_size = (lr / (1 - group.beta1**step)).to(grad.dtype)
        slot.param.sub_(slot.exp_avg / denominator * step_size)


def _adamw_fused(group: Group, slots: list[Slot], grads: list[Tensor]) -> None:
    steps = [slot.step for slot in slots]
    torch._foreach_add_(steps, 1)
    torch._fused_adamw_(
        [slot.param for slot in slots],
        grads,
        [slot.exp_avg for slot in slots],
        [slot.exp_avg_sq for slot in slots],
        [],
        steps,
        lr=float(group.lr),
        beta1=group.beta1,
        beta2=group.beta2,
        weight_decay=group.weight_decay,
        eps=group.eps,
        amsgrad=False,
        maximize=False,
    )


def adamw_ema(
    groups: Sequence[Group],
    options: Options,
    status: Tensor,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    *,
    fused: bool = False,
) -> None:
    """One step in place; the arguments are those of `ops.adamw_ema`, all tensors flat.

    Args:
        status: [6] fp32, see `STATUS`; written.
        fused: take torch's fused AdamW, which the CPU has too.
    """
    slots = [slot for group in groups for slot in group.slots]
    grads = [slot.grad for slot in slots if slot.grad is not None]
    skip = found_inf is not None and bool(found_inf != 0)
    factor = 1.0 if inv_scale is None else float(inv_scale)
    if options.norm_wanted:
        norms = torch._foreach_norm(grads)
        norm = float(torch.stack(norms).double().norm()) * abs(factor) if grads else 0.0
        status[2] = norm
        skip = skip or not math.isfinite(norm)
        if options.clip_norm is not None and not skip:
            factor *= min(1.0, options.clip_norm / (norm + 1e-6))
    status[0], status[1], status[5] = factor, skip, status[5] + skip
    if skip:
        return
    for group in groups:
        moved = [slot for slot in group.slots if slot.grad is not None]
        grads = [slot.grad for slot in moved]
        if factor != 1.0:
            grads = torch._foreach_mul(grads, factor) if grads else []
        if moved:
            (_adamw_fused if fused else _adamw_eager)(group, moved, grads)
    params = [slot.param for slot in slots]
    if options.radius is not None and slots:
        _project(params, [slot.reference for slot in slots], options.radius, status)
    if options.ema_decay is not None and slots:
        torch._foreach_lerp_([slot.ema for slot in slots], params, 1 - options.ema_decay)
    for slot in slots:
        if slot.shadow is None:
            continue
        value = slot.param
        if options.noise_std:
            count = (options.seed, slot.id, int(slot.step), value.numel(), value.device)
            value = value + options.noise_std * weight_noise(*count).to(value.dtype)
        slot.shadow.copy_(value)


def _project(params: list[Tensor], references: list[Tensor], radius: float, status: Tensor) -> None:
    differences = torch._foreach_sub(params, references)
    distance = float(torch.stack(torch._foreach_norm(differences)).double().norm())
    outside = radius < distance < math.inf
    ratio = radius / distance * (1 - 2.0**-20) if outside else 1.0
    status[3], status[4] = distance, ratio
    if outside:
        for param, reference, difference in zip(params, references, differences, strict=True):
            param.copy_(reference + ratio * difference)
