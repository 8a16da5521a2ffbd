"""trigger_normalize_backward in Triton; the same sums in the same order as the native kernels.

Map: a program owns 256 window pixels of one trigger and one slice of its samples, and writes
partial sums; a second kernel adds the slices in order and finishes the gradients.
Bound: memory; the gradient and the uint8 images are read once.
See csrc/ops/trigger_normalize_backward.h for the formulas.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from pybackdoor.kernels._philox import double, halves
from pybackdoor.kernels._trigger_normalize_launch import (
    DTYPES,
    absent,
    decide,
    forms_of,
    patch_of,
    patch_offset,
    sizes,
)
from pybackdoor.kernels._variant import Variant

if TYPE_CHECKING:
    from pybackdoor.ops._trigger_normalize_arguments import Inputs, Plain

__all__ = ["backward", "variants"]

BLOCK, WARPS = 256, 4
FINISH_BLOCK = 256
PLAIN = "patch_size has_order has_id has_position has_strength has_plan additive clip batch slices "
PLAIN += "window_height window_width mask_channels strength_high strength_low"
PLAIN = PLAIN.split()
FINISH_PLAIN = "slices area has_mask want_pattern want_mask mask_channels nonzero_only "
FINISH_PLAIN += "additive patch_clip"
FINISH_PLAIN = FINISH_PLAIN.split()


@triton.jit
def element(
    images,
    grad,
    source,
    goal,
    used,
    t,
    m,
    s,
    clip,
    additive,
    total,
    moment,
    MASK: tl.constexpr,
):
    """One sample's part in the sums of one channel; m is not looked at unless MASK."""
    level = tl.load(images + source, mask=used, other=0).to(tl.float32)
    g = tl.load(grad + goal, mask=used, other=0.0).to(tl.float32)
    term = tl.where(used, g * s.to(tl.float32), 0.0)
    if clip != 0:
        weight = s
        if MASK:
            weight = s * m.to(tl.float64)
        rest = tl.where(additive != 0, 1.0, (1.0 - weight).to(tl.float32))
        value = weight.to(tl.float32) * t + rest * tl.div_rn(level, 255.0)
        term = tl.where((value >= 0.0) & (value <= 1.0), term, 0.0)
    return total + term, moment + term * level


@triton.jit(do_not_specialize=PLAIN)
def accumulate_kernel(
    images,  # uint8, in the input's layout
    grad,  # dtype, in the output's layout
    pattern,  # [T, 3, h, w] fp32
    mask,  # [T, mask_channels, h, w] fp32, not read unless MASK
    trigger_id,  # [B] int32, not read unless has_id; so the others
    position,  # [B, 2] int32
    strength,  # [B] fp64
    plan,  # [B, 4] int32: noisy, and the erased square's y, x, side
    order,  # [B] int64
    begin,  # [T + 1] int64
    partial,  # [T, slices, 1 or 2, 3, h, w] fp32; 2 with MASK
    tiles,
    height,
    width,
    pixel_step,
    channel_step,
    patch_size,
    has_order,
    has_id,
    has_position,
    has_strength,
    has_plan,
    additive,
    clip,
    batch,
    slices,
    window_height,
    window_width,
    mask_channels,
    strength_high,
    strength_low,
    MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0) % tiles
    part = tl.program_id(0) // tiles
    trigger = part // slices
    index = part % slices
    area = window_height * window_width
    plane = height * width
    at = tile * BLOCK + tl.arange(0, BLOCK)
    in_window = at < area
    row = at // window_width
    col = at - row * window_width

    start = tl.load(begin + trigger, mask=has_order != 0, other=0)
    end = tl.load(begin + trigger + 1, mask=has_order != 0, other=0)
    count = tl.where(has_order != 0, end - start, batch.to(tl.int64))
    low = (start + count * index // slices).to(tl.int32)
    high = (start + count * (index + 1) // slices).to(tl.int32)

    window = trigger.to(tl.int64) * area
    known = at < tl.where(clip != 0, area, 0)
    t0 = tl.load(pattern + window * 3 + at, mask=known, other=0.0)
    t1 = tl.load(pattern + window * 3 + area + at, mask=known, other=0.0)
    t2 = tl.load(pattern + window * 3 + 2 * area + at, mask=known, other=0.0)
    m0 = t0
    m1 = t1
    m2 = t2
    if MASK:
        shift = tl.where(mask_channels == 3, area, 0)
        masks = mask + window * mask_channels
        m0 = tl.load(masks + at, mask=known, other=0.0)
        m1 = tl.load(masks + shift + at, mask=known, other=0.0)
        m2 = tl.load(masks + 2 * shift + at, mask=known, other=0.0)

    sum0 = tl.zeros([BLOCK], dtype=tl.float32)
    sum1 = tl.zeros([BLOCK], dtype=tl.float32)
    sum2 = tl.zeros([BLOCK], dtype=tl.float32)
    moment0 = tl.zeros([BLOCK], dtype=tl.float32)
    moment1 = tl.zeros([BLOCK], dtype=tl.float32)
    moment2 = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(low, high):
        b = tl.zeros([], dtype=tl.int64) + i
        b = tl.where(has_order != 0, tl.load(order + b, mask=has_order != 0, other=0), b)
        own = tl.load(trigger_id + b, mask=has_id != 0, other=0)
        top = tl.load(position + 2 * b, mask=has_position != 0, other=0)
        left = tl.load(position + 2 * b + 1, mask=has_position != 0, other=0)
        s = tl.load(strength + b, mask=has_strength != 0, other=0.0)
        s = tl.where(has_strength != 0, s, double(strength_high, strength_low))
        hit = (own == trigger) & (top > -window_height) & (top < height)
        hit &= (left > -window_width) & (left < width)
        y = tl.where(hit, top + row, -1)
        x = tl.where(hit, left + col, -1)
        used = in_window & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        hole_y = tl.load(plan + 4 * b + 1, mask=has_plan != 0, other=0)
        hole_x = tl.load(plan + 4 * b + 2, mask=has_plan != 0, other=0)
        side = tl.load(plan + 4 * b + 3, mask=has_plan != 0, other=0)
        hole = (y >= hole_y) & (y < hole_y + side) & (x >= hole_x) & (x < hole_x + side)
        used = used & (hole == 0)
        pixel = y * width + x
        goal = pixel
        step = plane
        if patch_size != 0:
            goal = patch_offset(y, x, width, patch_size)
            step = patch_size * patch_size
        source = b * plane * 3 + pixel * pixel_step
        goal = b * plane * 3 + goal
        sum0, moment0 = element(
            images, grad, source, goal, used, t0, m0, s, clip, additive, sum0, moment0, MASK
        )
        source += channel_step
        goal += step
        sum1, moment1 = element(
            images, grad, source, goal, used, t1, m1, s, clip, additive, sum1, moment1, MASK
        )
        source += channel_step
        goal += step
        sum2, moment2 = element(
            images, grad, source, goal, used, t2, m2, s, clip, additive, sum2, moment2, MASK
        )
    if MASK:
        out = partial + part.to(tl.int64) * 6 * area + at
        tl.store(out + 3 * area, moment0, mask=in_window)
        tl.store(out + 4 * area, moment1, mask=in_window)
        tl.store(out + 5 * area, moment2, mask=in_window)
    else:
        out = partial + part.to(tl.int64) * 3 * area + at
    tl.store(out, sum0, mask=in_window)
    tl.store(out + area, sum1, mask=in_window)
    tl.store(out + 2 * area, sum2, mask=in_window)


@triton.jit(do_not_specialize=FINISH_PLAIN)
def finish_kernel(
    partial,  # [T, slices, 1 or 2, 3, area] fp32; 2 with has_mask
    pattern,  # [T, 3, area] fp32
    mask,  # [T, mask_channels, area] fp32, not read unless has_mask
    pattern_grad,  # like pattern, not written unless want_pattern
    mask_grad,  # like mask, not written unless want_mask
    tiles,
    slices,
    area,
    has_mask,
    want_pattern,
    want_mask,
    mask_channels,
    nonzero_only,
    additive,
    patch_clip,
    std0,
    std1,
    std2,
    BLOCK: tl.constexpr,
):
    trigger = (tl.program_id(0) // tiles).to(tl.int64)
    at = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    used = at < area
    masked = at < tl.where(has_mask != 0, area, 0)
    into_pattern = at < tl.where(want_pattern != 0, area, 0)
    into_mask = at < tl.where((want_mask != 0) & (mask_channels == 3), area, 0)
    into_shared = at < tl.where((want_mask != 0) & (mask_channels == 1), area, 0)
    step = tl.where(has_mask != 0, 6, 3).to(tl.int64) * area
    shared = tl.zeros([BLOCK], dtype=tl.float32)
    for c in tl.static_range(3):
        total = tl.zeros([BLOCK], dtype=tl.float32)
        moment = tl.zeros([BLOCK], dtype=tl.float32)
        sums = partial + trigger * slices * step + c * area + at
        for _ in range(slices):
            total += tl.load(sums, mask=used, other=0.0)
            moment += tl.load(sums + 3 * area, mask=masked, other=0.0)
            sums += step
        here = (trigger * 3 + c) * area + at
        there = trigger * mask_channels + tl.where(mask_channels == 3, c, 0)
        there = there * area + at
        t = tl.load(pattern + here, mask=used, other=0.0)
        m = tl.load(mask + there, mask=masked, other=1.0)
        outside = tl.where(patch_clip != 0, t, 0.0)
        fast = (tl.where(nonzero_only != 0, t, 1.0) == 0.0) | (outside < 0.0) | (outside > 1.0)
        if c == 0:
            std = std0
        elif c == 1:
            std = std1
        else:
            std = std2
        value = tl.where(fast, 0.0, tl.div_rn(m * total, std))
        tl.store(pattern_grad + here, value, mask=into_pattern)
        d = t * total
        d = tl.where(additive != 0, d, d - tl.div_rn(moment, 255.0))
        d = tl.where(fast, 0.0, tl.div_rn(d, std))
        tl.store(mask_grad + there, d, mask=into_mask)
        shared += d
    tl.store(mask_grad + trigger * area + at, shared, mask=into_shared)


def backward(
    inputs: Inputs,
    grad: Tensor,
    order: Tensor | None,
    begin: Tensor | None,
    partial: Tensor,
    pattern_grad: Tensor | None,
    mask_grad: Tensor | None,
    plain: Plain,
) -> None:
    """Fills the gradients that are given; `partial` is [T, slices, 2 with a mask or 1, 3, h, w]."""
    images, pattern, mask, trigger_id, position, strength, _ = inputs
    triggers, slices = partial.shape[:2]
    area = pattern.shape[2] * pattern.shape[3]
    tiles = triton.cdiv(area, BLOCK)
    nonzero_only, additive, clip = map(int, plain.flags)
    whole = plain.mode == "patch"  # a blend of strength 1, whose clip knows no image
    strength = None if whole else strength
    value = 1.0 if whole else plain.strength_value
    plan = decide(inputs, plain) if len(images) else None
    height, width, pixel_step, channel_step = sizes(images, plain.input_layout)
    patch_size = patch_of(plain.layout, plain.patch_size)
    given = (order, trigger_id, position, strength, plan)
    mask_channels = 0 if mask is None else mask.shape[1]

    accumulate_kernel[(triggers * slices * tiles,)](
        *(images, grad, pattern, pattern if mask is None else mask),
        absent(trigger_id, images, torch.int32),
        *(absent(position, images, torch.int32), absent(strength, images, torch.float64)),
        *(absent(plan, images, torch.int32), absent(order, images, torch.int64)),
        *(absent(begin, images, torch.int64), partial, tiles, height, width),
        *(pixel_step, channel_step, patch_size, *(int(t is not None) for t in given), additive),
        *(0 if whole else clip, len(images), slices, *pattern.shape[2:], mask_channels),
        *halves(float(value)),
        MASK=mask is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    tiles = triton.cdiv(area, FINISH_BLOCK)
    finish_kernel[(triggers * tiles,)](
        *(partial, pattern, pattern if mask is None else mask),
        partial if pattern_grad is None else pattern_grad,
        *(partial if mask_grad is None else mask_grad, tiles, slices, area),
        *(int(mask is not None), int(pattern_grad is not None), int(mask_grad is not None)),
        *(mask_channels, nonzero_only, additive),
        *(int(whole and clip), *map(float, plain.std)),
        BLOCK=FINISH_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )


def variants() -> list[Variant]:
    """All that `backward` can launch, besides the coins of the forward pass."""
    numbers = ["tiles", "height", "width", "pixel_step", "channel_step", *PLAIN]
    found = []
    for masked, dtype in product((False, True), DTYPES):
        signature = {"images": "*u8", "grad": f"*{dtype}", "pattern": "*fp32", "mask": "*fp32"}
        signature |= {"trigger_id": "*i32", "position": "*i32", "strength": "*fp64"}
        signature |= {"plan": "*i32", "order": "*i64", "begin": "*i64", "partial": "*fp32"}
        signature |= dict.fromkeys(numbers, "i32")
        constexprs = {"MASK": masked, "BLOCK": BLOCK}
        launch = {"num_warps": WARPS, "fp_fusion": False, "forms": forms_of(dtype)}
        name = f"accumulate{'_mask' * masked}_{dtype}"
        found.append(Variant(accumulate_kernel, name, signature, constexprs, **launch))
    pointers = ["partial", "pattern", "mask", "pattern_grad", "mask_grad"]
    signature = dict.fromkeys(pointers, "*fp32") | dict.fromkeys(["tiles", *FINISH_PLAIN], "i32")
    signature |= dict.fromkeys(["std0", "std1", "std2"], "fp32")
    constexprs = {"BLOCK": FINISH_BLOCK}
    found.append(Variant(finish_kernel, "finish", signature, constexprs, fp_fusion=False))
    return found
