"""What the Triton kernels of adamw_ema do with a block of elements of one tensor.

Columns of the table: param, grad, exp_avg, exp_avg_sq, step, ema, shadow, reference, numel,
aligned, id; an address is 0 for what is absent. FULL: the block lies within the tensor and its
addresses are multiples of 16. Needs ``enable_fp_fusion=False``.
"""

import triton
import triton.language as tl

from pybackdoor.kernels._normal import normal
from pybackdoor.ops._adamw_ema_table import COLUMNS

WIDTH = tl.constexpr(COLUMNS)


@triton.jit
def pointer_to(address):
    return address.to(tl.pointer_type(tl.float32))


@triton.jit
def load(address, i, mask, FULL: tl.constexpr):
    if FULL:  # Triton 3.6 keeps the hint only on the tensor of pointers
        values = tl.load(tl.multiple_of(pointer_to(address) + i, 16), eviction_policy="evict_first")
    else:
        values = tl.load(pointer_to(address) + i, mask=mask, other=0.0)
    return values


@triton.jit
def store(address, i, values, mask, FULL: tl.constexpr):
    if FULL:
        pointers = tl.multiple_of(pointer_to(address) + i, 16)
        tl.store(pointers, values, eviction_policy="evict_first")
    else:
        tl.store(pointer_to(address) + i, values, mask=mask)


@triton.jit
def noise(seed_low, seed_high, id, step, i):
    """Standard normals of elements i (int64) of a tensor; as add_weight_noise."""
    low = seed_low.to(tl.uint32, bitcast=True).to(tl.uint64)
    seed = low | (seed_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32)
    block = (i >> 2).to(tl.uint32)
    same = tl.zeros_like(block)
    w0, w1, w2, w3 = tl.philox(
        seed, block, same + 2, same + id.to(tl.uint32), same + step.to(tl.uint32), 10
    )
    upper = (i & 2) != 0
    return normal(tl.where(upper, w2, w0), tl.where(upper, w3, w1), (i & 1) != 0)


@triton.jit
def copies(tensor, start, i, p, mask, step, config, NOISE: tl.constexpr, FULL: tl.constexpr):
    """Average and bf16 copy of the new weights p."""
    ema_weight, noise_std, seed_low, seed_high = config
    param, grad, exp_avg, exp_avg_sq, average, shadow, reference, id = tensor
    if average != 0:
        address = average + start * 4
        ema = load(address, i, mask, FULL)
        store(address, i, ema + ema_weight * (p - ema), mask, FULL)
    if shadow != 0:
        address = shadow + start * 2
        if NOISE:
            p = p + noise_std * noise(seed_low, seed_high, id, step, start + i)
        bits = p.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(p == p, rounded, 0x7FC0).to(tl.int16)
        if FULL:
            pointers = tl.multiple_of(address.to(tl.pointer_type(tl.int16)) + i, 16)
            tl.store(pointers, rounded)
        else:
            tl.store(address.to(tl.pointer_type(tl.int16)) + i, rounded, mask=mask)


@triton.jit
def update(
    tensor,
    start,
    i,
    mask,
    shared,
    group,
    config,
    NOISE: tl.constexpr,
    BALL: tl.constexpr,
    FULL: tl.constexpr,
):
    """AdamW of a block and what follows; returns the squared distances with BALL, else 0."""
    factor, step_size, bias2_sqrt, decay, step = shared
    weight1, weight2, eps = group
    param, grad, exp_avg, exp_avg_sq, average, shadow, reference, id = tensor
    p = load(param + start * 4, i, mask, FULL)
    if grad != 0:
        g = load(grad + start * 4, i, mask, FULL) * factor
        m = load(exp_avg + start * 4, i, mask, FULL)
        v = load(exp_avg_sq + start * 4, i, mask, FULL)
        m = m + weight1 * (g - m)
        v = v + weight2 * (g * g - v)
        denominator = tl.div_rn(tl.sqrt_rn(v), bias2_sqrt) + eps
        p = p - (tl.div_rn(step_size * m, denominator) + decay * p)
        store(param + start * 4, i, p, mask, FULL)
        store(exp_avg + start * 4, i, m, mask, FULL)
        store(exp_avg_sq + start * 4, i, v, mask, FULL)
    square = tl.zeros_like(p)
    if BALL:
        d = p - load(reference + start * 4, i, mask, FULL)
        square = tl.where(mask, d * d, 0.0)
    else:
        copies(tensor, start, i, p, mask, step, config, NOISE, FULL)
    return square


@triton.jit
def project(tensor, start, i, mask, ratio, step, config, NOISE: tl.constexpr, FULL: tl.constexpr):
    """Projection of a block, then average and copy."""
    param, grad, exp_avg, exp_avg_sq, average, shadow, reference, id = tensor
    p = load(param + start * 4, i, mask, FULL)
    if ratio < 1.0:
        r = load(reference + start * 4, i, mask, FULL)
        p = r + ratio * (p - r)
        store(param + start * 4, i, p, mask, FULL)
    copies(tensor, start, i, p, mask, step, config, NOISE, FULL)


@triton.jit
def find(rows, chunks, chunk, CHUNK: tl.constexpr):
    """A chunk's row, place in the table, first element, size, and whether it goes by vectors."""
    row, start = tl.load(chunks + chunk * 2), tl.load(chunks + chunk * 2 + 1)
    place = rows + row * WIDTH
    n = tl.minimum(tl.load(place + 8) - start, CHUNK).to(tl.int32)
    return row, place, start, n, (n == CHUNK) & (tl.load(place + 9) != 0)


@triton.jit
def read(place):
    """The tensor at a place of the table: param, grad, exp_avg, exp_avg_sq, ema, ..., id."""
    return (
        tl.load(place),
        tl.load(place + 1),
        tl.load(place + 2),
        tl.load(place + 3),
        tl.load(place + 5),
        tl.load(place + 6),
        tl.load(place + 7),
        tl.load(place + 10),
    )
