"""What the kernels of contrastive_par share: the scores' shift, its limit, accurate functions.

Triton's exp multiplies by log2(e) and rounds, an error of |x| 2^-24 of the result; exp here puts
the rounded-off part back. None needs libdevice.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_LOW = tl.constexpr(1.9259629911266175e-08)  # log2(e) less its fp32
LN2 = tl.constexpr(0.6931471805599453)
TINY = tl.constexpr(math.exp(-70))  # smaller sums are formed again, with a shift of their own


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


@triton.jit
def needs_fixing(x):
    return (x < TINY) | (x == float("inf"))


def types_of(kernel: Any, sizes: list[str], special: dict[str, str]) -> dict[str, str]:
    """The kernel's signature: pointers to fp32 but for the special ones and the sizes."""
    integers = {"owner": "*i32", "segment": "*i32", "bits": "*u8", "flagged": "*i32"}
    scalars = {"distance_weight": "fp32", "tau": "fp32"} | dict.fromkeys(sizes, "i32")
    known = integers | scalars | special
    return {n: known.get(n, "*fp32") for n in kernel.arg_names if not n.isupper()}
