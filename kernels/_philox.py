"""Philox4x32-10 and normal numbers for Triton kernels; the same bits as csrc/core/philox.h gives.

Products and sums are rounded one by one: launch with enable_fp_fusion=False.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl

M0 = tl.constexpr(0xD2511F53)
M1 = tl.constexpr(0xCD9E8D57)
W0 = tl.constexpr(0x9E3779B9)
W1 = tl.constexpr(0xBB67AE85)
LN2_LOW = tl.constexpr(-2.12194440e-4)  # ln 2 in two parts, the larger of few bits
LN2_HIGH = tl.constexpr(0.693359375)
QUARTER_TURN = tl.constexpr(float.fromhex("0x1.921fb6p-22"))  # (pi / 2) / 2^22
UNIT_24 = tl.constexpr(2.0**-24)


def halves(value: float | int) -> tuple[int, int]:
    """High and low 32 bits, signed, of an fp64 number or a 64 bit integer."""
    code = ">d" if isinstance(value, float) else ">q" if value < 1 << 63 else ">Q"
    return struct.unpack(">ii", struct.pack(code, value))


@triton.jit
def double(high, low):
    """The fp64 number of two int32 halves: a launch rounds a Python float to fp32."""
    bits = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Four words; all arguments uint32 tensors that broadcast."""
    zero = c0 ^ c0
    c1 += zero
    c2 += zero
    c3 += zero
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, zero + M0)
        high1 = tl.umulhi(c2, zero + M1)
        low0 = c0 * M0
        low1 = c2 * M1
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 += W0
        k1 += W1
    return c0, c1, c2, c3


@triton.jit
def log_unit(u):
    """ln(u) for normal u in (0, 1]; Cephes logf."""
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    x = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    z = x * x
    k = e.to(tl.float32)
    p = 7.0376836292e-2 * x - 1.1514610310e-1
    p = p * x + 1.1676998740e-1
    p = p * x - 1.2420140846e-1
    p = p * x + 1.4249322787e-1
    p = p * x - 1.6668057665e-1
    p = p * x + 2.0000714765e-1
    p = p * x - 2.4999993993e-1
    p = p * x + 3.3333331174e-1
    y = p * x * z + k * LN2_LOW - z * 0.5
    return x + y + k * LN2_HIGH


@triton.jit
def normal_pair(w0, w1):
    """Two standard normal numbers from two words (Box-Muller)."""
    u = ((w0 >> 8) + 1).to(tl.int32).to(tl.float32) * UNIT_24
    radius = tl.sqrt_rn(log_unit(u) * -2.0)
    turn = (w1 >> 8).to(tl.int32)
    quadrant = (turn + (1 << 21)) >> 22
    r = (turn - (quadrant << 22)).to(tl.float32) * QUARTER_TURN
    z = r * r
    s = z * -1.9515295891e-4 + 8.3321608736e-3
    s = s * z - 1.6666654611e-1
    s = s * z * r + r
    c = z * 2.443315711809948e-5 - 1.388731625493765e-3
    c = c * z + 4.166664568298827e-2
    c = c * z * z - z * 0.5 + 1.0
    swap = (quadrant & 1) != 0
    cosine = tl.where(swap, s, c)
    sine = tl.where(swap, c, s)
    cosine = tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)
    sine = tl.where((quadrant & 2) != 0, -sine, sine)
    return radius * cosine, radius * sine


@triton.jit
def normals(first_block, stream_view, id_low, id_high, k0, k1, BLOCK: tl.constexpr):
    """BLOCK normal numbers from BLOCK // 4 Philox blocks, four in order from each."""
    counter = (first_block + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    w0, w1, w2, w3 = philox(counter, stream_view, id_low, id_high, k0, k1)
    n0, n1 = normal_pair(w0, w1)
    n2, n3 = normal_pair(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
