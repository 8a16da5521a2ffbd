"""From the registered ops' flat arguments to what the kernels and the reference take."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from pybackdoor._native import sent
from pybackdoor.ops._trigger_normalize_check import DTYPES, INPUT_LAYOUTS, LAYOUTS
from pybackdoor.ops._trigger_table import MODES, Augment, TriggerTable, unchecked_table


class Inputs(NamedTuple):
    """The tensors that both passes read, contiguous and on the images' device."""

    images: Tensor  # [B, H, W, 3] or [B, 3, H, W] uint8
    pattern: Tensor | None  # [T, 3, h, w] fp32
    mask: Tensor | None  # [T, 1 or 3, h, w] fp32
    trigger_id: Tensor | None  # [B] int32
    position: Tensor | None  # [B, 2] int32
    strength: Tensor | None  # [B] fp64
    sample_id: Tensor | None  # [B] int64


class Plain(NamedTuple):
    """The plain values that both passes take; see trigger_normalize_fwd."""

    mode: str
    flags: list[bool]
    strength_value: float
    augment: list[float]
    seed: int
    view: int
    input_layout: str
    layout: str
    patch_size: int
    std: list[float]


def on_device(images: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Index tensors, which may be on the CPU, where the images are."""
    return tuple(t if t is None else sent(t, images.device) for t in tensors)


def saturated_int32(x: Tensor) -> Tensor:
    """Integers as int32; one that does not fit stays outside every range by saturating."""
    if x.dtype == torch.int64:  # narrower ones fit, and torch < 2.15 clamps them to no such bound
        x = x.clamp(-(1 << 31), (1 << 31) - 1)
    return x.to(torch.int32)


def contiguous_inputs(
    images: Tensor,
    pattern: Tensor | None,
    mask: Tensor | None,
    trigger_id: Tensor | None,
    position: Tensor | None,
    strength: Tensor | None,
    sample_id: Tensor | None,
) -> Inputs:
    """The tensors as the kernels read them."""
    trigger_id, position, strength, sample_id = on_device(
        images, trigger_id, position, strength, sample_id
    )
    trigger_id, position = (t if t is None else saturated_int32(t) for t in (trigger_id, position))
    strength = None if strength is None else strength.to(torch.float64)
    tensors = (images, pattern, mask, trigger_id, position, strength, sample_id)
    return Inputs(*(t if t is None else t.contiguous() for t in tensors))


def native_arguments(inputs: Inputs, plain: Plain, dtype: torch.dtype) -> dict[str, object]:
    """The keywords that both native functions share; `inputs` must outlive the call."""
    images, pattern, mask = inputs[:3]
    on_gpu = images.device.type == "cuda"
    nhwc = plain.input_layout == "nhwc"
    table = (0, 0, 0, 0)
    if pattern is not None:
        table = (len(pattern), 0 if mask is None else mask.shape[1], *pattern.shape[2:])
    addresses = {k: 0 if t is None else t.data_ptr() for k, t in inputs._asdict().items()}
    return {
        **addresses,
        "image_size": (len(images), *(images.shape[1:3] if nhwc else images.shape[2:])),
        "table_size": table,
        "mode": MODES.index(plain.mode),
        "flags": plain.flags,
        "strength_value": plain.strength_value,
        "augment": bool(plain.augment),
        "augment_values": plain.augment or [0.0] * 5,
        "seed": plain.seed,
        "view": plain.view,
        "input_layout": INPUT_LAYOUTS.index(plain.input_layout),
        "layout": LAYOUTS.index(plain.layout),
        "patch_size": plain.patch_size,
        "dtype": DTYPES.index(dtype),
        "std": plain.std,
        "device": images.device.index if on_gpu else -1,
        "stream": torch.cuda.current_stream(images.device).cuda_stream if on_gpu else 0,
        "isa": os.environ.get("PYBACKDOOR_CPU_ISA") or "auto",
        "threads": torch.get_num_threads(),
    }


def table_of(
    mode: str,
    flags: list[bool],
    pattern: Tensor | None,
    mask: Tensor | None,
    grid: Tensor | None = None,
) -> TriggerTable:
    """The TriggerTable for the reference."""
    nonzero_only, additive, clip = flags
    return unchecked_table(
        mode=mode,
        pattern=pattern,
        mask=mask,
        grid=grid,
        nonzero_only=nonzero_only,
        additive=additive,
        clip=clip,
    )


def augment_of(augment: list[float], noise: str) -> Augment | None:
    """The Augment for the reference."""
    if not augment:
        return None
    noise_p, noise_std, erase_p, *area = augment
    return Augment(noise_p, noise_std, noise, erase_p, tuple(area))
