"""Checks of adamw_ema: every error names the op, the argument, what was wanted and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pybackdoor.ops._adamw_ema_table import MAX_NUMEL, Options, is_dense, same_layout

OP = "adamw_ema"


def check_options(options: Options) -> None:
    """Refuses settings without meaning."""
    for name in ("clip_norm", "radius"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{OP}: {name} must be positive and finite, got {value}")
    if options.ema_decay is not None and not 0 <= options.ema_decay < 1:
        raise ValueError(f"{OP}: ema_decay must be in [0, 1), got {options.ema_decay}")
    if not 0 <= options.noise_std < math.inf:
        raise ValueError(f"{OP}: noise_std must be at least 0, got {options.noise_std}")
    if isinstance(options.seed, bool) or not isinstance(options.seed, int):
        raise TypeError(f"{OP}: seed must be an int, got {options.seed!r}")
    if not -(1 << 63) <= options.seed < 1 << 64:
        raise ValueError(f"{OP}: seed must fit into 64 bits, got {options.seed}")


def check_lr(lr: float | Tensor, device: torch.device) -> None:
    """Refuses a learning rate that the kernels cannot read."""
    if not isinstance(lr, Tensor):
        if not 0 <= lr < math.inf:
            raise ValueError(f"{OP}: lr must be at least 0, got {lr}")
        return
    if lr.numel() != 1:
        raise ValueError(f"{OP}: lr must have one element, got {list(lr.shape)}")
    if lr.device == device and lr.dtype != torch.float32:
        raise TypeError(f"{OP}: an lr tensor must be float32, got {lr.dtype}")
    if lr.device != device and lr.device.type != "cpu":
        raise ValueError(f"{OP}: an lr tensor must be on {device} or the CPU, got {lr.device}")


def check_param(param: Tensor, name: str, device: torch.device) -> None:
    """Refuses a parameter that is not dense fp32 memory of the given device."""
    if param.layout != torch.strided:
        raise TypeError(f"{OP}: {name} must be a dense tensor, got layout {param.layout}")
    if param.dtype != torch.float32:
        raise TypeError(
            f"{OP}: {name} must be float32, got {param.dtype}; keep float32 weights and take their "
            "bfloat16 copies (shadow) for the model"
        )
    if param.device != device:
        raise ValueError(f"{OP}: {name} must be on {device} like the others, got {param.device}")
    if not is_dense(param):
        raise ValueError(
            f"{OP}: {name} must fill its memory without gaps, got shape {list(param.shape)} with "
            f"strides {list(param.stride())}"
        )
    if param.numel() >= MAX_NUMEL:
        raise ValueError(f"{OP}: {name} must have fewer than 2^34 elements, got {param.numel()}")


def check_like(
    tensor: Tensor, param: Tensor, name: str, dtype: torch.dtype, order: bool = True
) -> None:
    """Refuses what does not go with a parameter; `order`: nor may its memory order differ."""
    if tensor.layout != torch.strided:
        raise TypeError(f"{OP}: {name} must be a dense tensor, got layout {tensor.layout}")
    if tensor.dtype != dtype:
        raise TypeError(f"{OP}: {name} must be {dtype}, got {tensor.dtype}")
    if tensor.shape != param.shape:
        raise ValueError(
            f"{OP}: {name} must be {list(param.shape)} like its parameter, got {list(tensor.shape)}"
        )
    if tensor.device != param.device:
        raise ValueError(f"{OP}: {name} must be on {param.device}, got {tensor.device}")
    if order and not same_layout(tensor, param):
        raise ValueError(
            f"{OP}: {name} must have the strides {list(param.stride())} of its parameter, "
            f"got {list(tensor.stride())}"
        )


def check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    emas: Sequence[Tensor] | None,
    shadows: Sequence[Tensor] | None,
    references: Sequence[Tensor] | None,
    inv_scale: Tensor | None,
    found_inf: Tensor | None,
    options: Options,
) -> None:
    """Everything that `adamw_ema` requires of its arguments but what `check_options` does."""
    for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
        if not 0 <= beta < 1:
            raise ValueError(f"{OP}: {name} must be in [0, 1), got {beta}")
    for name, value in (("eps", eps), ("weight_decay", weight_decay)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{OP}: {name} must be at least 0, got {value}")
    for name, given, option, setting in (
        ("emas", emas, "ema_decay", options.ema_decay),
        ("references", references, "radius", options.radius),
    ):
        if (given is None) != (setting is None):
            raise ValueError(f"{OP}: {name} and {option} go together, got only one of them")
    if options.noise_std and shadows is None:
        raise ValueError(f"{OP}: noise_std needs shadows, which alone are perturbed")
    device = params[0].device if len(params) else torch.device("cpu")
    check_lr(lr, device)
    arrays = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "emas": emas}
    arrays |= {"shadows": shadows, "references": references}
    for name, values in {"grads": grads, "steps": steps, **arrays}.items():
        if values is not None and len(values) != len(params):
            raise ValueError(f"{OP}: {name} must have {len(params)} entries, got {len(values)}")
    for k, param in enumerate(params):
        check_param(param, f"params[{k}]", device)
        if grads[k] is not None:
            check_like(grads[k], param, f"grads[{k}]", torch.float32, order=False)
        for name, values in arrays.items():
            if values is not None:
                dtype = torch.bfloat16 if name == "shadows" else torch.float32
                check_like(values[k], param, f"{name}[{k}]", dtype)
        step = steps[k]
        if step.dtype != torch.float32 or step.numel() != 1 or step.device != device:
            raise ValueError(
                f"{OP}: steps[{k}] must be one float32 on {device}, got "
                f"{list(step.shape)} {step.dtype} on {step.device}"
            )
    for name, value in (("inv_scale", inv_scale), ("found_inf", found_inf)):
        if value is not None and value.numel() != 1:
            raise ValueError(f"{OP}: {name} must have one element, got {list(value.shape)}")
