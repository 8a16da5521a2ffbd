"""Standard normal numbers from Philox words in Triton; the bits of csrc/core/normal.h.

Needs ``enable_fp_fusion=False``.
"""

import triton
import triton.language as tl


@triton.jit
def _log_unit(u):
    """ln(u) for normal u in (0, 1]; Cephes logf."""
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    x = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    z = x * x
    k = e.to(tl.float32)
    p = x * 7.0376836292e-2 + -1.1514610310e-1
    p = p * x + 1.1676998740e-1
    p = p * x + -1.2420140846e-1
    p = p * x + 1.4249322787e-1
    p = p * x + -1.6668057665e-1
    p = p * x + 2.0000714765e-1
    p = p * x + -2.4999993993e-1
    p = p * x + 3.3333331174e-1
    y = p * x * z
    y = y + k * -2.12194440e-4
    y = y + z * -0.5
    return x + y + k * 0.693359375


@triton.jit
def normal(w0, w1, second):
    """The first or `second` of the two normals of two uint32 words."""
    u = ((w0 >> 8) + 1).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    radius = tl.sqrt_rn(_log_unit(u) * -2.0)
    turn = (w1 >> 8).to(tl.int32)
    quadrant = (turn + (1 << 21)) >> 22
    r = (turn - (quadrant << 22)).to(tl.float32) * 3.745070282923929e-07  # (pi / 2) / 2^22
    z = r * r
    s = z * -1.9515295891e-4 + 8.3321608736e-3
    s = s * z + -1.6666654611e-1
    s = s * z * r + r
    c = z * 2.443315711809948e-5 + -1.388731625493765e-3
    c = c * z + 4.166664568298827e-2
    c = c * z * z + z * -0.5 + 1.0
    q = tl.where(second, quadrant + 3, quadrant)  # a sine is the cosine a quarter earlier
    value = tl.where((q & 1) != 0, s, c)
    return radius * tl.where(((q + 1) & 2) != 0, -value, value)
