"""adamw_ema: AdamW of many tensors with unscaling, clipping, an L2 ball, averages and bf16 copies.

`pybackdoor.optim.AdamWEma` is the optimizer made of it. On CUDA every pass over the weights
happens in one kernel and nothing synchronises; on the CPU torch's fused AdamW does the update.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pybackdoor import _backend, reference
from pybackdoor._native import _C
from pybackdoor.ops._adamw_ema_check import OP, check, check_options
from pybackdoor.ops._adamw_ema_table import (
    Group,
    Options,
    Slot,
    Table,
    TableCache,
    flat,
    like_param,
    new_status,
)

__all__ = ["StepStatus", "adamw_ema"]


class StepStatus(NamedTuple):
    """What a step did: [] fp32 views on the parameters' device, so that reading them is yours.

    Attributes:
        skipped: 1 if the step changed nothing, because found_inf was set or the norm not finite.
        grad_norm: L2 norm of all unscaled gradients before clipping; 0 unless clip_norm or
            skip_nonfinite asked for it.
        distance: L2 distance of all weights from the references before projecting; 0 without.
    """

    skipped: Tensor
    grad_norm: Tensor
    distance: Tensor


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _scalar(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.to(device, torch.float32, non_blocking=True)


def _native(
    table: Table,
    groups: Sequence[Group],
    options: Options,
    status: Tensor,
    inv_scale: Tensor | None,
    found_inf: Tensor | None,
    isa: str,
) -> str:
    """Calls the native kernels of the status's device; returns what ran ("cuda", "lanes32")."""
    device = status.device
    on_gpu = device.type == "cuda"
    on_device = [isinstance(g.lr, Tensor) and g.lr.device == device for g in groups]
    return _C.adamw_ema(
        tensors=table.rows.data_ptr(),
        chunks=table.chunks.data_ptr(),
        scalars=table.scalars.data_ptr(),
        partials=table.partials.data_ptr(),
        status=status.data_ptr(),
        inv_scale=_address(inv_scale),
        found_inf=_address(found_inf),
        sizes=(table.num_tensors, table.num_chunks, table.chunk),
        hypers=[
            (0.0 if at else float(g.lr), g.beta1, g.beta2, g.eps, g.weight_decay)
            for g, at in zip(groups, on_device, strict=True)
        ],
        lr_tensors=[g.lr.data_ptr() if at else 0 for g, at in zip(groups, on_device, strict=True)],
        ranges=table.ranges,
        norm_wanted=options.norm_wanted,
        clip_norm=math.inf if options.clip_norm is None else options.clip_norm,
        ema_decay=options.ema_decay or 0.0,
        radius=math.inf if options.radius is None else options.radius,
        noise_std=options.noise_std,
        seed=options.seed - (1 << 64) if options.seed >= 1 << 63 else options.seed,
        device=device.index if on_gpu else -1,
        stream=torch.cuda.current_stream(device).cuda_stream if on_gpu else 0,
        isa=isa,
    )


def run(
    groups: Sequence[Group],
    options: Options,
    status: Tensor,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    cache: TableCache | None = None,
) -> str:
    """One step of checked groups, in place; returns what ran.

    Args:
        groups: dense fp32 tensors in the order of their parameter's memory.
        status: [6] fp32; see `STATUS`.
        cache: keeps the table of addresses from one step to the next.
    """
    device = status.device
    if not any(group.slots for group in groups):
        return "nothing"
    inv_scale, found_inf = _scalar(inv_scale, device), _scalar(found_inf, device)
    name = _backend.choose(device, OP).name
    isa = os.environ.get("PYBACKDOOR_CPU_ISA", "")
    driver = name == "cpu" and isa.startswith("lanes")  # the body shared with CUDA, for tests
    if name in ("cuda", "triton") or driver:
        table = (cache or TableCache()).get(groups, device)
        if name == "triton":
            from pybackdoor.kernels import adamw_ema as kernels

            with torch.cuda.device(device):
                kernels.launch(table, groups, options, status, inv_scale, found_inf)
            return name
        return _native(table, groups, options, status, inv_scale, found_inf, isa)
    flattened = [
        group._replace(slots=[_flat_slot(slot) for slot in group.slots]) for group in groups
    ]
    fused = name == "cpu"
    reference.adamw_ema(flattened, options, status, inv_scale, found_inf, fused=fused)
    return "torch_fused" if fused else "reference"


def _flat_slot(slot: Slot) -> Slot:
    """The slot with every array as [numel] in the order of memory."""
    arrays = [
        t if t is None or k == 4 else flat(t) for k, t in enumerate(slot[:8])
    ]  # 4: step, which is no array
    return Slot(*arrays, slot.id)


@torch.library.custom_op(
    "pybackdoor::adamw_ema_step",
    mutates_args={"params", "exp_avgs", "exp_avg_sqs", "steps", "emas", "shadows"},
)
def adamw_ema_step(
    params: list[Tensor],
    grads: list[Tensor | None],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    emas: list[Tensor],
    shadows: list[Tensor],
    references: list[Tensor],
    lr_tensor: Tensor | None,
    inv_scale: Tensor | None,
    found_inf: Tensor | None,
    hyper: list[float],
    clip_norm: float | None,
    skip_nonfinite: bool,
    ema_decay: float | None,
    radius: float | None,
    noise_std: float,
    seed: int,
) -> Tensor:
    """The registered op behind `adamw_ema`; `hyper` is lr, beta1, beta2, eps, weight_decay.

    Returns:
        [6] fp32 status; see `STATUS`.
    """
    lr, beta1, beta2, eps, weight_decay = hyper
    slots = [
        Slot(
            param,
            None if grads[k] is None else like_param(grads[k], param),
            exp_avgs[k],
            exp_avg_sqs[k],
            steps[k],
            emas[k] if emas else None,
            shadows[k] if shadows else None,
            references[k] if references else None,
            k,
        )
        for k, param in enumerate(params)
    ]
    group = Group(slots, lr if lr_tensor is None else lr_tensor, beta1, beta2, eps, weight_decay)
    options = Options(clip_norm, skip_nonfinite, ema_decay, radius, noise_std, seed)
    status = new_status(params[0].device)
    run([group], options, status, inv_scale, found_inf)
    return status


@adamw_ema_step.register_fake
def _(params, *rest):
    return torch.empty(6, dtype=torch.float32, device=params[0].device)


@torch.no_grad()
def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    emas: Sequence[Tensor] | None = None,
    ema_decay: float | None = None,
    shadows: Sequence[Tensor] | None = None,
    references: Sequence[Tensor] | None = None,
    radius: float | None = None,
    clip_norm: float | None = None,
    skip_nonfinite: bool = False,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    noise_std: float = 0.0,
    seed: int = 0,
) -> StepStatus:
    """One AdamW step of many tensors in place, with what usually surrounds it.

    In this order, g being all gradients together and p all weights:
        g <- inv_scale g;  g <- g min(1, clip_norm / (|g| + 1e-6));
        AdamW as torch.optim.AdamW: p <- p - lr (weight_decay p + m / (1 - beta1^t) /
            (sqrt(v / (1 - beta2^t)) + eps));
        p <- r + (p - r) min(1, radius / |p - r|) for the references r;
        ema <- ema + (1 - ema_decay) (p - ema);  shadow <- bfloat16(p + noise_std N(0, 1)).
    If found_inf is set, or the norm of the gradients is taken and is not finite, nothing at all
    changes, step counts included. The gradients are only read.

    Args:
        params: float32, dense in memory, in any order of dimensions.
        grads: float32 like params; None: no AdamW update, but projection, average and copy.
        exp_avgs, exp_avg_sqs, emas, references: float32, in memory as params.
        steps: [] float32 each, on the parameters' device; steps taken so far.
        lr: a float, or [] float32 on the parameters' device, which a CUDA graph reads anew.
        emas: exponential moving averages of the weights; with ema_decay in [0, 1).
        shadows: bfloat16 copies of the weights, written only.
        references: centre of the ball; with its radius > 0.
        clip_norm: > 0; None: no clipping.
        skip_nonfinite: take the norm even without clip_norm, to skip a step that is not finite.
        inv_scale: [] float32 that the gradients are multiplied by.
        found_inf: [] float32; not 0: skip.
        noise_std: of the normal noise in the shadows alone, a pure function of (seed, index of the
            tensor, its step count, place in memory).
        seed: 64 bits.
    Returns:
        Whether the step was skipped, the gradients' norm, the distance; nothing was waited for.
    Raises:
        TypeError: a dtype, layout or type is not as above.
        ValueError: a length, shape, device, memory order or value is not as above.
    Example:
        >>> p, g, m, v, t = (torch.ones(1), torch.ones(1), *(torch.zeros(1) for _ in "mv"),
        ...                  torch.zeros(()))
        >>> _ = adamw_ema([p], [g], [m], [v], [t], lr=0.1)
        >>> p
        tensor([0.9000])
    """
    options = Options(clip_norm, skip_nonfinite, ema_decay, radius, noise_std, seed)
    check_options(options)
    check(
        *(params, grads, exp_avgs, exp_avg_sqs, steps, lr, betas, eps, weight_decay),
        *(emas, shadows, references, inv_scale, found_inf, options),
    )
    if not params:
        return StepStatus(*torch.zeros(3, device="cpu").unbind())
    by_value = not isinstance(lr, Tensor) or lr.device != params[0].device
    status = adamw_ema_step(
        [p.detach() for p in params],
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        list(steps),
        list(emas or ()),
        list(shadows or ()),
        list(references or ()),
        None if by_value else lr,
        inv_scale,
        found_inf,
        [float(lr) if by_value else 0.0, *map(float, betas), float(eps), float(weight_decay)],
        clip_norm,
        skip_nonfinite,
        ema_decay,
        radius,
        noise_std,
        seed - (1 << 64) if seed >= 1 << 63 else seed,
    )
    return StepStatus(status[1], status[2], status[3])
