"""contrastive_par, the stages between the products: sums, factors of dS, loss, gates.

Map: a program per block of text rows or images; one program for the totals, one for the gates.
Bound: launch and memory; the partial sums are read once, the rest is a few floats a row.
Why: eager needs some twenty launches, and a host that waits to know whether a gate is open.
Every sum is formed in a fixed order; the one atomic adds integers.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pybackdoor.kernels._contrastive_par_math import (
    exp,
    needs_fixing,
    score_shift,
    sigmoid,
    softplus,
    types_of,
)
from pybackdoor.kernels._variant import Variant

__all__ = ["close", "finalise", "sums", "totals", "variants"]

BLOCK, STEP = 128, 8  # columns and slices of partials that a program reads at once
TOTAL = 4096  # rows that the one program of totals reads at once
SUM_SIZES = "row_slices col_slices text_rows columns images".split()
FINALISE_SIZES = "text_rows columns images offset".split()
TOTAL_SIZES = "text_rows images offset".split()


@triton.jit
def sum_slices(partial, out, slices, width, x, BLOCK: tl.constexpr, STEP: tl.constexpr):
    k = tl.arange(0, STEP)
    total = tl.zeros((STEP, BLOCK), tl.float32)
    for start in range(0, slices, STEP):
        at = partial + (start + k).to(tl.int64)[:, None] * width + x[None, :]
        mask = (k < slices - start)[:, None] & (x < width)[None, :]
        total += tl.load(at, mask=mask, other=0.0)
    tl.store(out + x, tl.sum(total, 0), mask=x < width)


@triton.jit(do_not_specialize=SUM_SIZES)
def sum_kernel(
    row_partial,  # [row_slices, text_rows] fp32
    col_partial,  # [col_slices, columns] fp32
    target,  # [text_rows] fp32
    weight,  # [text_rows] fp32
    segment,  # [images + 1] int32
    scale,  # [] fp32
    r,  # [text_rows] fp32
    c,  # [columns] fp32
    log_p,  # [images] fp32
    row_slices,
    col_slices,
    text_rows,
    columns,
    images,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    block = tl.program_id(0)
    row_blocks, column_blocks = tl.cdiv(text_rows, BLOCK), tl.cdiv(columns, BLOCK)
    if block < row_blocks:
        x = block * BLOCK + tl.arange(0, BLOCK)
        sum_slices(row_partial, r, row_slices, text_rows, x, BLOCK, STEP)
    elif block < row_blocks + column_blocks:
        x = (block - row_blocks) * BLOCK + tl.arange(0, BLOCK)
        sum_slices(col_partial, c, col_slices, columns, x, BLOCK, STEP)
    else:
        j = (block - row_blocks - column_blocks) * BLOCK + tl.arange(0, BLOCK)
        shift = score_shift(tl.load(scale))
        begin = tl.load(segment + j, mask=j < images, other=0)
        count = tl.load(segment + j + 1, mask=j < images, other=0) - begin
        longest = tl.max(count, 0)
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        for k in range(0, longest):
            inside = k < count
            w = tl.load(weight + begin + k, mask=inside, other=0.0)
            s = tl.load(target + begin + k, mask=inside, other=0.0)
            top = tl.maximum(top, tl.where(w > 0, s - shift, float("-inf")))
        base = tl.where(tl.abs(top) == float("inf"), 0.0, top)
        total = tl.zeros((BLOCK,), tl.float32)
        for k in range(0, longest):
            inside = k < count
            w = tl.load(weight + begin + k, mask=inside, other=0.0)
            s = tl.load(target + begin + k, mask=inside, other=0.0)
            total += tl.where(w > 0, exp(s - shift - base), 0.0)
        value = tl.where(total == 0, float("-inf"), base + tl.log(total))
        tl.store(log_p + j, value, mask=j < images)


@triton.jit
def column_factors(c, col_lse, log_p, column_weight, j, inside):
    """Of images j: whether they take no part, are to be fixed, their sum, y, weight and eta."""
    sum_c = tl.load(c + j, mask=inside, other=1.0)
    v = tl.load(column_weight + j, mask=inside, other=0.0)
    p = tl.load(log_p + j, mask=inside, other=0.0)
    fix = needs_fixing(sum_c) & (v != 0)
    log_c = tl.where(fix, tl.load(col_lse + j, mask=inside, other=0.0), tl.log(sum_c))
    off = (log_c == float("-inf")) | (p == float("-inf")) | (v == 0)
    y = tl.where(off, 0.0, p - log_c)
    v = tl.where(off, 0.0, v)
    return off, fix, sum_c, y, v, -v * sigmoid(-y)


@triton.jit(do_not_specialize=FINALISE_SIZES)
def finalise_kernel(
    target,  # [text_rows] fp32
    r,  # [text_rows] fp32
    c,  # [columns] fp32
    log_p,  # [columns] fp32
    row_lse,  # [text_rows] fp32
    col_lse,  # [columns] fp32
    owner,  # [text_rows] int32
    weight,  # [text_rows] fp32
    column_weight,  # [columns] fp32
    scale,  # [] fp32
    alpha,  # [text_rows] fp32
    beta,  # [columns] fp32
    coef,  # [text_rows] fp32
    row_fix,  # [text_rows] fp32
    col_fix,  # [columns] fp32
    loss_row,  # [text_rows] fp32
    loss_col,  # [images] fp32
    flagged,  # [2] int32
    text_rows,
    columns,
    images,
    offset,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    row_blocks = tl.cdiv(text_rows, BLOCK)
    if block < row_blocks:
        i = block * BLOCK + tl.arange(0, BLOCK)
        inside = i < text_rows
        shift = score_shift(tl.load(scale))
        s = tl.load(target + i, mask=inside, other=0.0) - shift
        w = tl.load(weight + i, mask=inside, other=0.0)
        sum_r = tl.load(r + i, mask=inside, other=1.0)
        fix = needs_fixing(sum_r) & (w != 0)
        log_r = tl.where(fix, tl.load(row_lse + i, mask=inside, other=0.0), tl.log(sum_r))
        none = (log_r == float("-inf")) | (w == 0)
        z = tl.where(none, 0.0, s - log_r)
        sign = tl.where(w > 0, 1.0, -1.0)
        magnitude = tl.where(none, 0.0, tl.abs(w))
        gamma = -magnitude * sign * sigmoid(-sign * z)
        tl.store(loss_row + i, magnitude * softplus(-sign * z), mask=inside)
        tl.store(alpha + i, tl.where(none | fix, 0.0, tl.div_rn(-gamma, sum_r)), mask=inside)
        tl.store(row_fix + i, tl.where(fix & (none == 0), -gamma, 0.0), mask=inside)
        # What the owner's column makes of the target, formed here so that no order is needed.
        own = tl.load(owner + i, mask=inside, other=0) + offset
        off, _, _, _, _, eta = column_factors(c, col_lse, log_p, column_weight, own, inside)
        p = tl.load(log_p + own, mask=inside, other=0.0)
        share = tl.where((w > 0) & (off == 0), eta * exp(s - p), 0.0)
        tl.store(coef + i, gamma + share, mask=inside)
        fixed = tl.sum((fix & (none == 0)).to(tl.int32), 0)
        if fixed > 0:
            tl.atomic_add(flagged, fixed)
    else:
        j = (block - row_blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = j < columns
        off, fix, sum_c, y, v, eta = column_factors(c, col_lse, log_p, column_weight, j, inside)
        tl.store(beta + j, tl.where(off | fix, 0.0, tl.div_rn(-eta, sum_c)), mask=inside)
        tl.store(col_fix + j, tl.where(fix & (off == 0), -eta, 0.0), mask=inside)
        mine = (j >= offset) & (j < offset + images)
        tl.store(loss_col + j - offset, v * softplus(-y), mask=mine)
        fixed = tl.sum((fix & (off == 0)).to(tl.int32), 0)
        if fixed > 0:
            tl.atomic_add(flagged + 1, fixed)


@triton.jit(do_not_specialize=TOTAL_SIZES)
def total_kernel(
    loss_row,  # [text_rows] fp32
    loss_col,  # [images] fp32
    dist_text,  # [text_rows] fp32
    dist_image,  # [images] fp32
    owner,  # [text_rows] int32
    bits,  # [A] uint8
    out,  # [5] fp32
    text_rows,
    images,
    offset,
    BLOCK: tl.constexpr,
):
    x = tl.arange(0, BLOCK)
    rows, distances = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, text_rows, BLOCK):
        inside = x < text_rows - start
        rows += tl.load(loss_row + start + x, mask=inside, other=0.0)
        distances += tl.load(dist_text + start + x, mask=inside, other=0.0)
        own = tl.load(owner + start + x, mask=inside, other=0)
        count += tl.load(bits + offset + own, mask=inside, other=0).to(tl.int32) & 1
    loss = tl.sum(rows, 0)
    tl.store(out + 1, tl.sum(distances, 0))
    tl.store(out + 2, tl.sum(count, 0).to(tl.float32))
    columns, distances = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, images, BLOCK):
        inside = x < images - start
        columns += tl.load(loss_col + start + x, mask=inside, other=0.0)
        distances += tl.load(dist_image + start + x, mask=inside, other=0.0)
        count += tl.load(bits + offset + start + x, mask=inside, other=0).to(tl.int32) & 1
    tl.store(out, loss + tl.sum(columns, 0))
    tl.store(out + 3, tl.sum(distances, 0))
    tl.store(out + 4, tl.sum(count, 0).to(tl.float32))


@triton.jit
def mean_distance(total, k):
    count = tl.load(total + k + 1)
    return tl.div_rn(tl.load(total + k), tl.where(count < 1.0, 1.0, count))


@triton.jit
def close_kernel(
    total,  # [5] fp32
    stats,  # [6] fp32
    distance_weight,
    tau,
):
    loss = tl.load(total)
    s_text, s_image = mean_distance(total, 1), mean_distance(total, 3)
    part = tl.where(s_image > tau, 0.0, distance_weight * s_image)
    part += tl.where(s_text > tau, 0.0, distance_weight * s_text)
    tl.store(stats, loss - part)
    tl.store(stats + 1, loss)
    tl.store(stats + 2, s_image)
    tl.store(stats + 3, s_text)
    tl.store(stats + 4, tl.where(s_image <= tau, 1.0, 0.0))
    tl.store(stats + 5, tl.where(s_text <= tau, 1.0, 0.0))


def sums(
    p: Any, row_partial: Tensor, col_partial: Tensor, target: Tensor, r: Tensor, c: Tensor,
    log_p: Tensor,
) -> None:  # fmt: skip
    """r [M] and c [A], the partials' sums in order; log_p [N], log P of this rank's images."""
    rows, columns, images = len(r), len(c), len(log_p)
    blocks = sum(triton.cdiv(n, BLOCK) for n in (rows, columns, images))
    sum_kernel[(blocks,)](
        row_partial, col_partial, target, p.weight, p.segment, p.scale, r, c, log_p,
        len(row_partial), len(col_partial), rows, columns, images, BLOCK=BLOCK, STEP=STEP,
        num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip


def finalise(
    p: Any, target: Tensor, r: Tensor, c: Tensor, log_p: Tensor, row_lse: Tensor, col_lse: Tensor,
    alpha: Tensor, beta: Tensor, coef: Tensor, row_fix: Tensor, col_fix: Tensor, loss_row: Tensor,
    loss_col: Tensor, flagged: Tensor,
) -> None:  # fmt: skip
    """Loss parts and the factors of dS; fixed lines have alpha, beta 0 and row_fix, col_fix.

    Args:
        p: the Problem.
        target, r, row_lse: [M] fp32; c, log_p, col_lse: [A] fp32, of all ranks' images.
        alpha, coef, row_fix, loss_row: [M] fp32, written.
        beta, col_fix: [A] fp32; loss_col: [N] fp32, written.
        flagged: [2] int32 += the fixed rows, and the fixed columns.
    """
    rows, columns = len(r), len(c)
    finalise_kernel[(triton.cdiv(rows, BLOCK) + triton.cdiv(columns, BLOCK),)](
        target, r, c, log_p, row_lse, col_lse, p.owner, p.weight, p.column_weight, p.scale, alpha,
        beta, coef, row_fix, col_fix, loss_row, loss_col, flagged, rows, columns, len(loss_col),
        p.offset, BLOCK=BLOCK, num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip


def totals(
    p: Any, loss_row: Tensor, loss_col: Tensor, dist_text: Tensor, dist_image: Tensor, out: Tensor
) -> None:
    """out [5] fp32: contrastive loss, sum of dist_text, its count, sum of dist_image, its count."""
    total_kernel[(1,)](
        loss_row, loss_col, dist_text, dist_image, p.owner, p.bits, out, len(loss_row),
        len(loss_col), p.offset, BLOCK=TOTAL, num_warps=8, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip


def close(total: Tensor, distance_weight: float, tau: float, stats: Tensor) -> None:
    """stats [6] fp32: loss, contrastive, s_image, s_text, gate_image, gate_text."""
    close_kernel[(1,)](
        total, stats, float(distance_weight), float(tau), num_warps=1, num_stages=1,
        enable_fp_fusion=True,
    )  # fmt: skip


def variants() -> list[Variant]:
    """Every kernel and configuration that the launchers above can choose."""
    found = []
    for kernel, name, sizes, constexprs, warps in (
        (sum_kernel, "sums", SUM_SIZES, {"BLOCK": BLOCK, "STEP": STEP}, 4),
        (finalise_kernel, "finalise", FINALISE_SIZES, {"BLOCK": BLOCK}, 4),
        (total_kernel, "totals", TOTAL_SIZES, {"BLOCK": TOTAL}, 8),
        (close_kernel, "close", [], {}, 1),
    ):
        types = types_of(kernel, sizes, {})
        found.append(Variant(kernel, name, types, constexprs, warps, 1, forms=("aligned",)))
    return found
