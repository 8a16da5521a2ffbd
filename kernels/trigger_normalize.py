"""trigger_normalize in Triton: for GPUs without nvcc; equal bit for bit to the native kernels.

Map: a program owns 512 pixels of one image; channel by channel, bytes in and floats out.
Bound: memory, as the native kernel; bytes of NHWC images are read one at a time.
Why: a GPU without nvcc would run the eager chain, some 87 B an element.
Warped images and the coins of the augmentation come from two small kernels of their own.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from pybackdoor.kernels._philox import double, halves, normals
from pybackdoor.kernels._trigger_normalize_launch import (
    DECIDE_BLOCK,
    DECIDE_PLAIN,
    DTYPES,
    absent,
    decide,
    decide_kernel,
    forms_of,
    patch_of,
    patch_offset,
    sizes,
)
from pybackdoor.kernels._variant import Variant
from pybackdoor.kernels.trigger_normalize_backward import backward

if TYPE_CHECKING:
    from pybackdoor.ops._trigger_normalize_arguments import Inputs, Plain

__all__ = ["backward", "forward", "variants"]

BLOCK, WARPS = 512, 4  # pixels: four a thread
STREAM_NOISE = tl.constexpr(1)
FLAGS = "has_id has_position has_strength nonzero_only additive clip quantize half_noise "
FLAGS += "write_images"
SMALL = "patch_size triggers window_height window_width mask_channels view strength_high "
SMALL += "strength_low seed_high seed_low"
PLAIN = [*FLAGS.split(), *SMALL.split()]
WARP_PLAIN = ["height", "width", "has_id", "triggers", "clip"]


@triton.jit
def quantized(value, clip):
    """Times 255, truncated, modulo 256; from 2^31 on every fp32 number is a multiple of 256."""
    value = tl.where(clip != 0, tl.minimum(tl.maximum(value, 0.0), 1.0), value)
    scaled = value * 255.0
    small = tl.abs(scaled) < 2147483648.0
    return tl.where(small, scaled, 0.0).to(tl.int32) & 255


@triton.jit(do_not_specialize=WARP_PLAIN)
def warp_kernel(
    images,  # uint8, in the input's layout
    warped,  # like images
    grid,  # [T, H, W, 2] fp32
    trigger_id,  # [B] int32, not read unless has_id
    tiles,
    height,
    width,
    pixel_step,
    channel_step,
    has_id,
    triggers,
    clip,
    BLOCK: tl.constexpr,
):
    """Warps the images that have a trigger and copies the others; grid_sample's definition."""
    b = tl.program_id(0) // tiles
    pixel = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    used = pixel < height * width
    trigger = tl.load(trigger_id + b, mask=has_id != 0, other=0)
    triggered = (trigger >= 0) & (trigger < triggers)
    plane = height.to(tl.int64) * width
    image = images + b * plane * 3
    copy = warped + b * plane * 3
    point = grid + tl.where(triggered, trigger, 0) * plane * 2 + 2 * pixel
    at = pixel < tl.where(triggered, height * width, 0)
    half_x = (width - 1).to(tl.float32) * 0.5
    half_y = (height - 1).to(tl.float32) * 0.5
    gx = (tl.load(point, mask=at, other=0.0) + 1.0) * half_x
    gy = (tl.load(point + 1, mask=at, other=0.0) + 1.0) * half_y
    gx = tl.minimum(tl.maximum(gx, -2.0), (width + 1).to(tl.float32))
    gy = tl.minimum(tl.maximum(gy, -2.0), (height + 1).to(tl.float32))
    x = gx.to(tl.int32)
    y = gy.to(tl.int32)
    x -= (x.to(tl.float32) > gx).to(tl.int32)
    y -= (y.to(tl.float32) > gy).to(tl.int32)
    w = gx - x.to(tl.float32)
    n = gy - y.to(tl.float32)
    e = tl.where((x >= 0) & (x < width), 1.0 - w, 0.0)
    s = tl.where((y >= 0) & (y < height), 1.0 - n, 0.0)
    w = tl.where((x >= -1) & (x < width - 1), w, 0.0)
    n = tl.where((y >= -1) & (y < height - 1), n, 0.0)
    x0 = tl.minimum(tl.maximum(x, 0), width - 1)
    x1 = tl.minimum(tl.maximum(x + 1, 0), width - 1)
    y0 = tl.minimum(tl.maximum(y, 0), height - 1) * width
    y1 = tl.minimum(tl.maximum(y + 1, 0), height - 1) * width
    for c in tl.static_range(3):
        channel = image + c * channel_step
        v0 = tl.load(channel + (y0 + x0) * pixel_step, mask=at, other=0).to(tl.float32)
        v1 = tl.load(channel + (y0 + x1) * pixel_step, mask=at, other=0).to(tl.float32)
        v2 = tl.load(channel + (y1 + x0) * pixel_step, mask=at, other=0).to(tl.float32)
        v3 = tl.load(channel + (y1 + x1) * pixel_step, mask=at, other=0).to(tl.float32)
        total = tl.div_rn(v0, 255.0) * (s * e)
        total += tl.div_rn(v1, 255.0) * (s * w)
        total += tl.div_rn(v2, 255.0) * (n * e)
        total += tl.div_rn(v3, 255.0) * (n * w)
        plain = tl.load(channel + pixel * pixel_step, mask=used, other=0).to(tl.int32)
        q = tl.where(triggered, quantized(total, clip), plain)
        tl.store(copy + pixel * pixel_step + c * channel_step, q.to(tl.uint8), mask=used)


@triton.jit(do_not_specialize=PLAIN)
def apply_kernel(
    images,  # uint8, in the input's layout
    out,  # dtype, in the output's layout
    poisoned,  # like images, not written unless write_images
    pattern,  # [T, 3, h, w] fp32
    mask,  # [T, mask_channels, h, w] fp32, not read if mask_channels is 0
    trigger_id,  # [B] int32, not read unless has_id
    position,  # [B, 2] int32, not read unless has_position
    strength,  # [B] fp64, not read unless has_strength
    plan,  # [B, 4] int32, not read unless AUGMENT
    sample_id,  # [B] int64, not read unless AUGMENT
    tiles,
    height,
    width,
    pixel_step,
    channel_step,
    patch_size,
    has_id,
    has_position,
    has_strength,
    nonzero_only,
    additive,
    clip,
    quantize,
    half_noise,
    write_images,
    triggers,
    window_height,
    window_width,
    mask_channels,
    view,
    strength_high,
    strength_low,
    seed_high,
    seed_low,
    noise_std,
    mean0,
    mean1,
    mean2,
    std0,
    std1,
    std2,
    AUGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    pixel = tile * BLOCK + tl.arange(0, BLOCK)
    used = pixel < height * width
    plane = height * width
    y = pixel // width
    x = pixel - y * width
    first = b.to(tl.int64) * plane * 3

    trigger = tl.load(trigger_id + b, mask=has_id != 0, other=0)
    top = tl.load(position + 2 * b, mask=has_position != 0, other=0)
    left = tl.load(position + 2 * b + 1, mask=has_position != 0, other=0)
    s = tl.load(strength + b, mask=has_strength != 0, other=0.0)
    s = tl.where(has_strength != 0, s, double(strength_high, strength_low))
    triggered = (trigger >= 0) & (trigger < triggers)
    triggered &= (top > -window_height) & (top < height) & (left > -window_width) & (left < width)
    row = tl.where(triggered, y - top, -1)
    col = tl.where(triggered, x - left, -1)
    inside = used & (row >= 0) & (row < window_height) & (col >= 0) & (col < window_width)
    area = window_height * window_width
    window = tl.where(triggered, trigger, 0).to(tl.int64) * area
    at = row * window_width + col
    a = s.to(tl.float32)
    rest = tl.where(additive != 0, 1.0, (1.0 - s).to(tl.float32))

    goal = pixel
    if patch_size != 0:
        goal = patch_offset(y, x, width, patch_size)
    erased = pixel < 0
    if AUGMENT:
        top = tl.load(plan + 4 * b + 1)
        left = tl.load(plan + 4 * b + 2)
        side = tl.load(plan + 4 * b + 3)
        erased = (y >= top) & (y < top + side) & (x >= left) & (x < left + side)
        noisy = tl.load(plan + 4 * b) != 0
        sample = tl.load(sample_id + b)
        low = (sample & 0xFFFFFFFF).to(tl.uint32)
        high = ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32)
        k0 = seed_low.to(tl.uint32, bitcast=True)
        k1 = seed_high.to(tl.uint32, bitcast=True)
        stream = ((view << 8) | STREAM_NOISE).to(tl.uint32)

    for c in tl.static_range(3):
        source = first + pixel * pixel_step + c * channel_step
        level = tl.load(images + source, mask=used, other=0).to(tl.int32)
        v = tl.div_rn(level.to(tl.float32), 255.0)
        t = tl.load(pattern + window * 3 + c * area + at, mask=inside, other=0.0)
        if mask_channels != 0:
            channel = tl.where(mask_channels == 3, c, 0)
            m = tl.load(mask + window * mask_channels + channel * area + at, mask=inside, other=0.0)
            weight = s * m.to(tl.float64)
            mixed_rest = tl.where(additive != 0, 1.0, (1.0 - weight).to(tl.float32))
            value = weight.to(tl.float32) * t + mixed_rest * v
        else:
            value = a * t + rest * v
        mixed = inside & (tl.where(nonzero_only != 0, t, 1.0) != 0.0)
        q = tl.where(mixed, quantized(value, clip), level)
        if write_images != 0:
            tl.store(poisoned + source, q.to(tl.uint8), mask=used)
        value = tl.where(clip != 0, tl.minimum(tl.maximum(value, 0.0), 1.0), value)
        value = tl.where(mixed, value, v)
        v = tl.where(quantize != 0, tl.div_rn(q.to(tl.float32), 255.0), value)
        if AUGMENT:
            if noisy:
                block = c * ((plane + 3) // 4) + tile * (BLOCK // 4)
                d = normals(block, stream, low, high, k0, k1, BLOCK) * noise_std
                d = tl.where(half_noise != 0, tl.minimum(tl.maximum(d, 0.0), 1.0), d)
                v = tl.minimum(tl.maximum(v + d, 0.0), 1.0)
        if c == 0:
            v = tl.div_rn(v - mean0, std0)
        elif c == 1:
            v = tl.div_rn(v - mean1, std1)
        else:
            v = tl.div_rn(v - mean2, std2)
        v = tl.where(erased, 0.0, v).to(out.dtype.element_ty)
        if patch_size != 0:
            tl.store(out + first + goal + c * patch_size * patch_size, v, mask=used)
        else:  # where neighbours are known to lie together
            tl.store(out + first + pixel + c * plane, v, mask=used)


def forward(
    inputs: Inputs,
    grid: Tensor | None,
    out: Tensor,
    poisoned: Tensor | None,
    half_noise: bool,
    quantize: bool,
    plain: Plain,
    mean: list[float],
) -> None:
    """Fills `out`, and `poisoned` where it is given."""
    images, pattern, mask, trigger_id, position, strength, sample_id = inputs
    if len(images) == 0:
        return
    height, width, pixel_step, channel_step = sizes(images, plain.input_layout)
    tiles = triton.cdiv(height * width, BLOCK)
    programs = (len(images) * tiles,)
    if plain.mode == "warp":
        warped = torch.empty_like(images) if poisoned is None else poisoned
        warp_kernel[programs](
            *(images, warped, grid, absent(trigger_id, images, torch.int32), tiles, height, width),
            *(pixel_step, channel_step, int(trigger_id is not None), len(grid)),
            int(plain.flags[2]),
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
        images, poisoned = warped, None
    plan = decide(inputs, plain)
    nonzero_only, additive, clip = map(int, plain.flags)
    patch_size = patch_of(plain.layout, plain.patch_size)
    whole = plain.mode == "patch"  # a blend of strength 1
    strength = None if whole else strength
    value = 1.0 if whole else plain.strength_value
    apply_kernel[programs](
        *(images, out, images if poisoned is None else poisoned),
        *(absent(t, images, torch.float32) for t in (pattern, mask)),
        *(absent(trigger_id, images, torch.int32), absent(position, images, torch.int32)),
        *(absent(strength, images, torch.float64), absent(plan, images, torch.int32)),
        absent(None if plan is None else sample_id, images, torch.int64),
        *(tiles, height, width, pixel_step, channel_step, patch_size, int(trigger_id is not None)),
        *(int(position is not None), int(strength is not None), nonzero_only, additive, clip),
        *(int(quantize), int(half_noise), int(poisoned is not None)),
        *(0 if pattern is None else len(pattern), *window_size(pattern)),
        *(0 if mask is None else mask.shape[1], plain.view, *halves(float(value))),
        *(*halves(plain.seed), float(plain.augment[1]) if plain.augment else 0.0),
        *(*map(float, mean), *map(float, plain.std)),
        AUGMENT=plan is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )


def window_size(pattern: Tensor | None) -> tuple[int, int]:
    """(h, w); any without triggers."""
    return (1, 1) if pattern is None else tuple(pattern.shape[2:])


def variants() -> list[Variant]:
    """All that `forward` can launch."""
    numbers = ["tiles", "height", "width", "pixel_step", "channel_step"]
    found = [
        Variant(
            decide_kernel,
            "decide",
            {"sample_id": "*i64", "plan": "*i32"} | dict.fromkeys(["batch", *DECIDE_PLAIN], "i32"),
            {"BLOCK": DECIDE_BLOCK},
            fp_fusion=False,
        ),
        Variant(
            warp_kernel,
            "warp",
            {"images": "*u8", "warped": "*u8", "grid": "*fp32", "trigger_id": "*i32"}
            | dict.fromkeys([*numbers, *WARP_PLAIN], "i32"),
            {"BLOCK": BLOCK},
            num_warps=WARPS,
            fp_fusion=False,
        ),
    ]
    floats = ["noise_std", "mean0", "mean1", "mean2", "std0", "std1", "std2"]
    for augmented, dtype in product((False, True), DTYPES):
        signature = {"images": "*u8", "out": f"*{dtype}", "poisoned": "*u8", "pattern": "*fp32"}
        signature |= {"mask": "*fp32", "trigger_id": "*i32", "position": "*i32"}
        signature |= {"strength": "*fp64", "plan": "*i32", "sample_id": "*i64"}
        signature |= dict.fromkeys([*numbers, *PLAIN], "i32")
        signature |= dict.fromkeys(floats, "fp32")
        constexprs = {"AUGMENT": augmented, "BLOCK": BLOCK}
        launch = {"num_warps": WARPS, "fp_fusion": False, "forms": forms_of(dtype)}
        name = f"apply{'_augment' * augmented}_{dtype}"
        found.append(Variant(apply_kernel, name, signature, constexprs, **launch))
    return found
