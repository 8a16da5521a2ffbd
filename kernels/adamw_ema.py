"""The Triton twin of csrc/ops/adamw_ema*: the same passes, formulas and, but for sums, bits.

Map: one program per chunk of a tensor; whole chunks of aligned tensors go by 16 B vectors, the rest
masked. Bound: memory, as the native kernels. Sums are made in a fixed order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from pybackdoor.kernels._adamw_ema_block import WIDTH, find, load, pointer_to, project, read, update
from pybackdoor.kernels._variant import Variant
from pybackdoor.ops._adamw_ema_table import CHUNK

BLOCK = 512  # of a chunk, at a time: 4 elements a thread
ROWS = 128  # tensors prepared by one program
PARTIALS = 2048  # partial sums added at a time
WARPS = 4
LAUNCH = {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": False}
# Entries of the status: factor, skip, norm, distance, ratio, skipped.
FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
CLIP_EPS = tl.constexpr(1e-6)
INSIDE = tl.constexpr(1.0 - 2.0**-20)


@triton.jit
def norm_kernel(rows, chunks, partials, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of the squared gradients of each chunk."""
    chunk = tl.program_id(0).to(tl.int64)
    _, place, start, n, full = find(rows, chunks, chunk, CHUNK)
    grad = tl.load(place + 1)
    i = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    if grad != 0:
        if full:
            for first in range(0, CHUNK, BLOCK):
                g = load(grad + start * 4, first + i, first + i < n, True)
                sums += g * g
        else:
            for first in range(0, n, BLOCK):
                g = load(grad + start * 4, first + i, first + i < n, False)
                sums += g * g
    tl.store(partials + chunk, tl.sum(sums, axis=0).to(tl.float64))


@triton.jit
def _total(partials, num_chunks, PARTIALS: tl.constexpr):
    sums = tl.zeros([PARTIALS], tl.float64)
    for first in range(0, num_chunks, PARTIALS):
        i = first + tl.arange(0, PARTIALS)
        sums += tl.load(partials + i, mask=i < num_chunks, other=0.0)
    return tl.sum(sums, axis=0)


@triton.jit(do_not_specialize=["num_chunks"])
def decide_kernel(
    partials,
    status,
    inv_scale,
    found_inf,
    num_chunks,
    clip_high,
    clip_low,
    NORM: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """Whether the step happens, and what the gradients are multiplied by; one program."""
    skip = tl.where(tl.load(found_inf) != 0.0, 1.0, 0.0)
    scale = tl.load(inv_scale).to(tl.float64)
    factor = scale
    if NORM:
        norm = tl.sqrt(_total(partials, num_chunks, PARTIALS)) * tl.abs(scale)
        tl.store(status + 2, norm.to(tl.float32))
        skip = tl.where(norm <= FLOAT_MAX, skip, 1.0)
        bound = (norm * 0.0 + clip_high + clip_low) / (norm + CLIP_EPS)
        factor = tl.where(bound < 1.0, scale * bound, scale)
    tl.store(status, factor.to(tl.float32))
    tl.store(status + 1, skip)
    tl.store(status + 5, tl.load(status + 5) + skip)


@triton.jit(do_not_specialize=["num_chunks"])
def distance_kernel(partials, status, num_chunks, radius_high, radius_low, PARTIALS: tl.constexpr):
    """The ratio of the projection; one program."""
    if tl.load(status + 1) == 0.0:
        distance = tl.sqrt(_total(partials, num_chunks, PARTIALS))
        radius = distance * 0.0 + radius_high + radius_low
        outside = (distance > radius) & (distance <= FLOAT_MAX)
        ratio = tl.where(outside, radius / distance * INSIDE, 1.0)
        tl.store(status + 3, distance.to(tl.float32))
        tl.store(status + 4, ratio.to(tl.float32))


@triton.jit
def _power(base, exponent):
    """base^exponent for exponents below 2^25; as `power` of the native body."""
    result = base * 0.0 + 1.0
    for _ in range(25):
        result = tl.where((exponent & 1) != 0, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit(do_not_specialize=["first", "count"])
def prepare_kernel(
    rows,
    scalars,
    status,
    lr_tensor,
    first,
    count,
    lr_high,
    lr_low,
    beta1_high,
    beta1_low,
    beta2_high,
    beta2_low,
    decay_high,
    decay_low,
    LR_TENSOR: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Counts the step of each tensor of a group, and computes what its elements share."""
    k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = k < tl.where(tl.load(status + 1) == 0.0, count, 0)
    row = (first + k).to(tl.int64)
    address = tl.load(rows + row * WIDTH + 4, mask=mask, other=0)
    grad = tl.load(rows + row * WIDTH + 1, mask=mask, other=0)
    step = tl.load(pointer_to(address), mask=mask, other=1.0) + tl.where(grad != 0, 1.0, 0.0)
    tl.store(pointer_to(address), step, mask=mask)
    zeros = tl.zeros([ROWS], tl.float64)
    lr = zeros + lr_high + lr_low
    if LR_TENSOR:
        lr = zeros + tl.load(lr_tensor).to(tl.float64)
    exponent = tl.maximum(step.to(tl.int32), 1)  # 0 where there never was a gradient
    bias1 = 1.0 - _power(zeros + beta1_high + beta1_low, exponent)
    bias2 = 1.0 - _power(zeros + beta2_high + beta2_low, exponent)
    decay = lr * (zeros + decay_high + decay_low)
    shared = scalars + row * 4
    tl.store(shared, (lr / bias1).to(tl.float32), mask=mask)
    tl.store(shared + 1, tl.sqrt(bias2).to(tl.float32), mask=mask)
    tl.store(shared + 2, decay.to(tl.float32), mask=mask)
    tl.store(shared + 3, step, mask=mask)


@triton.jit(do_not_specialize=["first_chunk", "seed_low", "seed_high"])
def update_kernel(
    rows,
    chunks,
    scalars,
    partials,
    status,
    first_chunk,
    weight1,
    weight2,
    eps,
    ema_weight,
    noise_std,
    seed_low,
    seed_high,
    NOISE: tl.constexpr,
    BALL: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """AdamW of a chunk; then its average and copy or, with BALL, its distance."""
    if tl.load(status + 1) == 0.0:
        chunk = first_chunk + tl.program_id(0).to(tl.int64)
        row, place, start, n, full = find(rows, chunks, chunk, CHUNK)
        at = scalars + row * 4
        step = tl.load(at + 3).to(tl.int32)
        shared = (tl.load(status), tl.load(at), tl.load(at + 1), tl.load(at + 2), step)
        group = (weight1, weight2, eps)
        config = (ema_weight, noise_std, seed_low, seed_high)
        tensor = read(place)
        i = tl.arange(0, BLOCK)
        sums = tl.zeros([BLOCK], tl.float32)
        if full:
            for first in range(0, CHUNK, BLOCK):
                j, mask = first + i, first + i < n
                sums += update(tensor, start, j, mask, shared, group, config, NOISE, BALL, True)
        else:
            for first in range(0, n, BLOCK):
                j, mask = first + i, first + i < n
                sums += update(tensor, start, j, mask, shared, group, config, NOISE, BALL, False)
        if BALL:
            tl.store(partials + chunk, tl.sum(sums, axis=0).to(tl.float64))


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def project_kernel(
    rows,
    chunks,
    scalars,
    status,
    ema_weight,
    noise_std,
    seed_low,
    seed_high,
    NOISE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Projection, average and copy of a chunk."""
    if tl.load(status + 1) == 0.0:
        row, place, start, n, full = find(rows, chunks, tl.program_id(0).to(tl.int64), CHUNK)
        step = tl.load(scalars + row * 4 + 3).to(tl.int32)
        ratio = tl.load(status + 4)
        config = (ema_weight, noise_std, seed_low, seed_high)
        tensor = read(place)
        i = tl.arange(0, BLOCK)
        if full:
            for first in range(0, CHUNK, BLOCK):
                j, mask = first + i, first + i < n
                project(tensor, start, j, mask, ratio, step, config, NOISE, True)
        else:
            for first in range(0, n, BLOCK):
                j, mask = first + i, first + i < n
                project(tensor, start, j, mask, ratio, step, config, NOISE, False)


def _two_floats(value: float) -> tuple[float, float]:
    """A double as the sum of two float32, as Triton passes floats; good to 2^-48."""
    high = torch.tensor(value, dtype=torch.float64, device="cpu").float().double().item()
    return high, value - high if math.isfinite(high) else 0.0


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def launch(table, groups, options, status, inv_scale, found_inf) -> None:
    """Queues one step on the current device and stream; see `ops.adamw_ema.run`."""
    clip = math.inf if options.clip_norm is None else options.clip_norm
    noise = options.noise_std != 0
    seed = _signed(options.seed & 0xFFFFFFFF), _signed(options.seed >> 32 & 0xFFFFFFFF)
    config = (1.0 - (options.ema_decay or 0.0), options.noise_std, *seed)
    sizes = {"CHUNK": table.chunk, "BLOCK": min(BLOCK, table.chunk)}
    ball = options.radius is not None
    if options.norm_wanted and table.num_chunks:
        norm_kernel[(table.num_chunks,)](
            table.rows, table.chunks, table.partials, **sizes, **LAUNCH
        )
    decide_kernel[(1,)](
        table.partials,
        status,
        table.one if inv_scale is None else inv_scale,
        table.zero if found_inf is None else found_inf,
        table.num_chunks,
        *_two_floats(clip),
        NORM=options.norm_wanted,
        PARTIALS=PARTIALS,
        **LAUNCH,
    )
    for group, (first, count, first_chunk, chunks) in zip(groups, table.ranges, strict=True):
        if count == 0:
            continue
        on_device = isinstance(group.lr, torch.Tensor) and group.lr.device == status.device
        prepare_kernel[(triton.cdiv(count, ROWS),)](
            table.rows,
            table.scalars,
            status,
            group.lr if on_device else status,
            first,
            count,
            *_two_floats(0.0 if on_device else float(group.lr)),
            *_two_floats(group.beta1),
            *_two_floats(group.beta2),
            *_two_floats(group.weight_decay),
            LR_TENSOR=on_device,
            ROWS=ROWS,
            **LAUNCH,
        )
        if chunks == 0:
            continue
        update_kernel[(chunks,)](
            table.rows,
            table.chunks,
            table.scalars,
            table.partials,
            status,
            first_chunk,
            1.0 - group.beta1,
            1.0 - group.beta2,
            group.eps,
            *config,
            NOISE=noise and not ball,
            BALL=ball,
            **sizes,
            **LAUNCH,
        )
    if ball and table.num_chunks:
        distance_kernel[(1,)](
            table.partials,
            status,
            table.num_chunks,
            *_two_floats(options.radius),
            PARTIALS=PARTIALS,
            **LAUNCH,
        )
        project_kernel[(table.num_chunks,)](
            table.rows,
            table.chunks,
            table.scalars,
            status,
            *config,
            NOISE=noise,
            **sizes,
            **LAUNCH,
        )


_TYPES = {"rows": "*i64", "chunks": "*i64", "partials": "*fp64"}
_TYPES |= {n: "*fp32" for n in ("scalars", "status", "inv_scale", "found_inf", "lr_tensor")}
_TYPES |= {n: "i32" for n in ("num_chunks", "first", "count", "first_chunk")}
_TYPES |= {n: "i32" for n in ("seed_low", "seed_high")}


def _variant(kernel, name: str, **constexprs) -> Variant:
    signature = {n: _TYPES.get(n, "fp32") for n in kernel.arg_names if n not in constexprs}
    return Variant(
        kernel, name, signature, constexprs, num_warps=WARPS, num_stages=1, fp_fusion=False
    )


def variants() -> list[Variant]:
    """Every kernel in every form that `launch` can choose."""
    sizes = {"CHUNK": CHUNK, "BLOCK": BLOCK}
    found = [
        _variant(norm_kernel, "norm", **sizes),
        _variant(distance_kernel, "distance", PARTIALS=PARTIALS),
        _variant(update_kernel, "update_ball", NOISE=False, BALL=True, **sizes),
    ]
    for flag in (False, True):
        found += [
            _variant(decide_kernel, f"decide_{flag:d}", NORM=flag, PARTIALS=PARTIALS),
            _variant(prepare_kernel, f"prepare_{flag:d}", LR_TENSOR=flag, ROWS=ROWS),
            _variant(update_kernel, f"update_{flag:d}", NOISE=flag, BALL=False, **sizes),
            _variant(project_kernel, f"project_{flag:d}", NOISE=flag, **sizes),
        ]
    return found
