"""The matrix stages on a GPU, by Triton: E kept whole, or formed again in waves of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from pybackdoor.kernels import contrastive_par as kernels
from pybackdoor.ops._contrastive_par_problem import Problem

BUDGET = 1 << 30  # bytes of E kept for the backward pass, unless the caller says otherwise
WAVE = 512 << 20  # bytes of the block of E that a wave forms again
_ROWS = 128  # a wave is a multiple of the largest tile's rows
_COLUMNS = 16  # E's rows are a multiple of it apart, so that they are read 16 bytes at a time


def matrix_dtype(acc: torch.dtype, precision: str) -> torch.dtype:
    """Of the unit rows and of E."""
    return torch.bfloat16 if precision == "bf16" else acc


def e_columns(a: int) -> int:
    """Columns of the memory for E [M, a]."""
    return (a + _COLUMNS - 1) // _COLUMNS * _COLUMNS


def exponentials(
    p: Problem,
    that: Tensor,  # [M, D]
    ihat: Tensor,  # [A, D]
    e: Tensor | None,  # [M, e_columns(A)], to be kept
    precision: str,
) -> tuple[Tensor, Tensor]:
    """E, and its sums: row_partial [Kr, M], col_partial [Kc, A]."""
    if precision == "tf32":
        _round_to_tf32(that)
        _round_to_tf32(ihat)
    if 0 in (len(that), len(ihat)):
        return p.scale.new_zeros(1, len(that)), p.scale.new_zeros(1, len(ihat))
    return _exp_block(p, that, ihat, 0, None if e is None else e[:, : len(ihat)], precision)


def gradients(
    p: Problem,
    that: Tensor,  # [M, D]
    ihat: Tensor,  # [A, D]
    e: Tensor | None,  # [M, e_columns(A)]; None: formed again
    alpha: Tensor,  # [M]
    beta: Tensor,  # [A]
    g_text: Tensor | None,  # [M, D], out
    g_image: Tensor | None,  # [A, D], out
    precision: str,
) -> None:
    """The matrix part of the features' gradients."""
    m, a = len(that), len(ihat)
    if 0 in (m, a):
        for g in (g_text, g_image):
            if g is not None:
                g.zero_()
        return
    rows = m if e is not None else wave_rows(a, that.dtype)
    work = that.new_empty(min(rows, m), e_columns(a)) if e is None else None
    for first in range(0, m, rows):
        block = that[first : first + rows]
        if work is None:
            part = e[:, :a]
        else:
            part = work[: len(block), :a]
            _exp_block(p, block, ihat, first, part, precision)
        kernels.gradients(
            p, block, ihat, part, first, alpha, beta,
            None if g_text is None else g_text[first : first + rows], g_image, precision, first > 0,
        )  # fmt: skip


def _round_to_tf32(x: Tensor) -> None:
    """To the nearest value of ten bits of mantissa, in place; tensor cores would cut them off.

    All unit rows would shrink alike, and with them every score but the target's, which is formed
    in fp32: at s = 100 that moves the loss by percents. What is not finite stays: a GPU's NaN,
    0x7fffffff, would be rounded to -0.
    """
    near = x.clone()
    near.view(torch.int32).add_(0x1000).bitwise_and_(-0x2000)
    x.copy_(torch.where(x.isfinite(), near, x))


def wave_rows(a: int, dtype: torch.dtype) -> int:
    """Rows of E [M, a] that are formed again at a time."""
    return max(_ROWS, WAVE // (dtype.itemsize * e_columns(a)) // _ROWS * _ROWS)


def _exp_block(
    p: Problem, that: Tensor, ihat: Tensor, first: int, e: Tensor | None, precision: str
) -> tuple[Tensor, Tensor]:
    slices = kernels.partials(p, len(that), precision, e)
    row_partial = p.scale.new_empty(slices[0], len(p.text))
    col_partial = p.scale.new_empty(slices[1], len(ihat))
    kernels.exp_block(p, that, ihat, first, e, row_partial, col_partial, precision)
    return row_partial, col_partial
