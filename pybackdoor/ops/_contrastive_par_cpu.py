"""The matrix stages on the CPU: products by row blocks in torch, exp and sums in native code."""

from __future__ import annotations

import torch
from torch import Tensor

from pybackdoor.ops import _contrastive_par_native as native
from pybackdoor.ops._contrastive_par_problem import Problem
from pybackdoor.ops._matmul import matmul_nt

# Elements of one block: it stays in a core's share of the cache between product and pass, and
# below the 32 MiB from which malloc may return its pages to the system after each block.
_BLOCK = 1 << 21
BUDGET = 256 << 20  # bytes of E kept for the backward pass, unless the caller says otherwise


def matrix_dtype(acc: torch.dtype, precision: str) -> torch.dtype:
    """fp32 and fp64 are computed as such: no CPU keeps fp32 sums of bf16 products to itself."""
    return acc


def e_columns(a: int) -> int:
    """Columns of the memory for E [M, a]."""
    return a


def _block_rows(p: Problem) -> int:
    return max(16, _BLOCK // max(1, len(p.bits)) // 16 * 16)


def exponentials(
    p: Problem,
    that: Tensor,  # [M, D]
    ihat: Tensor,  # [A, D]
    e: Tensor | None,  # [M, A], to be kept
    precision: str,
) -> tuple[Tensor, Tensor]:
    """E, and its sums: row_partial [1, M], col_partial [blocks, A]."""
    rows = _block_rows(p)
    starts = range(0, len(that), rows)
    row_partial = that.new_empty(1, len(that))
    col_partial = that.new_empty(max(1, len(starts)), len(ihat))
    if not starts:
        col_partial.zero_()
    for k, first in enumerate(starts):
        scores = matmul_nt(that[first : first + rows], ihat)
        native.exp_block(p, scores, first, row_partial, col_partial[k : k + 1])
        if e is not None:
            e[first : first + rows] = scores
    return row_partial, col_partial


def gradients(
    p: Problem,
    that: Tensor,  # [M, D]
    ihat: Tensor,  # [A, D]
    e: Tensor | None,  # [M, A]; None: formed again
    alpha: Tensor,  # [M]
    beta: Tensor,  # [A]
    g_text: Tensor | None,  # [M, D], out
    g_image: Tensor | None,  # [A, D], out
    precision: str,
) -> None:
    """The matrix part of the features' gradients."""
    rows = _block_rows(p)
    sums = that.new_empty(1, len(that)), that.new_empty(1, len(ihat))
    if g_image is not None:
        g_image.zero_()
    for first in range(0, len(that), rows):
        block = that[first : first + rows]
        if e is None:
            scores = matmul_nt(block, ihat)
            native.exp_block(p, scores, first, *sums)
            ds = scores
        else:
            scores = e[first : first + rows]
            ds = torch.empty_like(scores)
        native.scale_block(p, scores, alpha, beta, first, ds)
        if g_text is not None:
            g_text[first : first + rows] = matmul_nt(ds, ihat.T)
        if g_image is not None:
            g_image += matmul_nt(ds.T, block.T)
