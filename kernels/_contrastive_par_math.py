"""What the kernels of contrastive_par share: the shift of the scores and accurate functions.

Triton's exp multiplies by log2(e) and rounds, an error of |x| 2^-24 of the result; exp here puts
the rounded-off part back. None needs libdevice.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_LOW = tl.constexpr(1.9259629911266175e-08)  # log2(e) less its fp32
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def score_shift(scale):
    """m = max(0, s - 75); NaN stays NaN."""
    return tl.where(scale <= 75.0, 0.0, scale - 75.0)


@triton.jit
def exp(x):
    """exp(x) to about 2 ulp; results below 2^-126 are 0."""
    y = x * LOG2E
    value = tl.exp2(y)
    left = tl.fma(x, LOG2E_LOW, tl.fma(x, LOG2E, -y))
    return tl.where((value > 0) & (value < float("inf")), tl.fma(value, left * LN2, value), value)


@triton.jit
def sigmoid(x):
    small = exp(-tl.abs(x))
    return tl.div_rn(tl.where(x >= 0, 1.0, small), 1.0 + small)


@triton.jit
def softplus(x):
    """log(1 + exp(x)); log1p(u) is log(w) u / (w - 1) with w = 1 + u rounded."""
    u = exp(-tl.abs(x))
    w = 1.0 + u
    log1p = tl.where(w == 1.0, u, tl.log(w) * tl.div_rn(u, tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.maximum(x, 0.0) + log1p
