"""What both passes of trigger_normalize launch and hand to their kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from pybackdoor.kernels._philox import double, halves, philox

if TYPE_CHECKING:
    from pybackdoor.ops._trigger_normalize_arguments import Inputs, Plain

DTYPES = ("fp32", "fp16", "bf16")  # of the output and its gradient
DECIDE_BLOCK = 128  # images of a program
DECIDE_PLAIN = [f"{n}_{h}" for n in "noise_p erase_p area_low area_high seed".split() for h in "hl"]
DECIDE_PLAIN += ["view", "height", "width"]
UNIT_32 = tl.constexpr(2.0**-32)


@triton.jit(do_not_specialize=DECIDE_PLAIN)
def decide_kernel(
    sample_id,  # [B] int64
    plan,  # [B, 4] int32: noisy, and the erased square's y, x, side
    batch,
    noise_p_h,  # fp64 and the seed in halves
    noise_p_l,
    erase_p_h,
    erase_p_l,
    area_low_h,
    area_low_l,
    area_high_h,
    area_high_l,
    seed_h,
    seed_l,
    view,
    height,
    width,
    BLOCK: tl.constexpr,
):
    """Words 0-4 of stream 0: the coins, the area, the square's y and x."""
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.load(sample_id + b, mask=b < batch, other=0)
    low = (sample & 0xFFFFFFFF).to(tl.uint32)
    high = ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32)
    k0 = seed_l.to(tl.uint32, bitcast=True)
    k1 = seed_h.to(tl.uint32, bitcast=True)
    stream = (view << 8).to(tl.uint32)
    zero = low ^ low
    w0, w1, w2, w3 = philox(zero, stream, low, high, k0, k1)
    w4, w5, w6, w7 = philox(zero + 1, stream, low, high, k0, k1)
    area_low = double(area_low_h, area_low_l)
    share = w2.to(tl.float64) * UNIT_32 * (double(area_high_h, area_high_l) - area_low) + area_low
    area = share * (height.to(tl.float64) * width.to(tl.float64))
    side = (tl.sqrt(area) + 0.5).to(tl.int64)
    side = tl.maximum(tl.minimum(side, tl.minimum(height, width).to(tl.int64)), 1)
    y = (w3.to(tl.int64) * (height - side + 1)) >> 32
    x = (w4.to(tl.int64) * (width - side + 1)) >> 32
    noisy = w0.to(tl.float64) * UNIT_32 < double(noise_p_h, noise_p_l)
    erased = w1.to(tl.float64) * UNIT_32 < double(erase_p_h, erase_p_l)
    tl.store(plan + 4 * b, noisy.to(tl.int32), mask=b < batch)
    tl.store(plan + 4 * b + 1, y.to(tl.int32), mask=b < batch)
    tl.store(plan + 4 * b + 2, x.to(tl.int32), mask=b < batch)
    tl.store(plan + 4 * b + 3, tl.where(erased, side, 0).to(tl.int32), mask=b < batch)


def sizes(images: Tensor, input_layout: str) -> tuple[int, int, int, int]:
    """(height, width, pixel_step, channel_step) of the images."""
    if input_layout == "nhwc":
        return *images.shape[1:3], 3, 1
    height, width = images.shape[2:]
    return height, width, 1, height * width


def patch_of(layout: str, patch_size: int) -> int:
    """The patch size of an output's layout: 0 for planes, 1 for channels_last."""
    return {"nchw": 0, "channels_last": 1}.get(layout, patch_size)


@triton.jit
def patch_offset(y, x, width, patch_size):
    """Where channel 0 of a pixel lies in an image cut into patches of three planes each."""
    patch = (y // patch_size) * (width // patch_size) + x // patch_size
    return patch * (3 * patch_size * patch_size) + (y % patch_size) * patch_size + x % patch_size


def decide(inputs: Inputs, plain: Plain) -> Tensor | None:
    """[B, 4] int32: noisy, and the erased square's y, x, side; None without augmentation."""
    if not plain.augment:
        return None
    images = inputs.images
    height, width = sizes(images, plain.input_layout)[:2]
    plan = torch.empty((len(images), 4), dtype=torch.int32, device=images.device)
    noise_p, _, erase_p, *area = plain.augment
    doubles = [h for v in (noise_p, erase_p, *area) for h in halves(float(v))]
    decide_kernel[(triton.cdiv(len(images), DECIDE_BLOCK),)](
        *(inputs.sample_id, plan, len(images), *doubles, *halves(plain.seed)),
        *(plain.view, height, width),
        BLOCK=DECIDE_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return plan


def absent(tensor: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor, or something that has its type and is not read."""
    return torch.empty(1, dtype=dtype, device=like.device) if tensor is None else tensor


def forms_of(dtype: str) -> tuple[str, ...]:
    """What a kernel is compiled as ahead of time: the dtypes differ in a conversion alone."""
    return ("aligned", "plain") if dtype == "fp32" else ("aligned",)
