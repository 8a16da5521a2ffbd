"""contrastive_par, the slow path: lines whose sums the common shift made too small or too large.

Map: a program per 16 lines (and, for gradients, a slice of the features); it forms their scores
    again, block by block in index order. Without such a line it returns at once.
Bound: launch; when lines are flagged, one more product per block of 16 lines that has one.
Why: at a best cosine below -0.45 and s = 100, exp(S - m) of a whole line underflows.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pybackdoor.kernels._contrastive_par_math import exp, needs_fixing, score_shift, types_of
from pybackdoor.kernels._variant import Variant

__all__ = ["fixup", "lse", "variants"]

SHAPE = {"LINES": 16, "OTHERS": 16, "STEP": 16}
WIDTH = 64  # features of a gradient that a program forms
LSE_SIZES = "text_rows columns depth offset".split()
FIX_SIZES = "text_rows columns depth offset text_programs".split()


@triton.jit
def scores(
    lines, others, line, other, line_count, other_count, depth,
    LINES: tl.constexpr, OTHERS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """[LINES, OTHERS] products of rows; rows past the end repeat the last one."""
    k = tl.arange(0, STEP)
    a = lines + tl.minimum(line, line_count - 1).to(tl.int64)[:, None] * depth + k[None, :]
    b = others + tl.minimum(other, other_count - 1).to(tl.int64)[None, :] * depth + k[:, None]
    product = tl.zeros((LINES, OTHERS), tl.float32)
    for start in range(0, depth, STEP):
        inside = k < depth - start
        x = tl.load(a + start, mask=inside[None, :], other=0.0)
        y = tl.load(b + start, mask=inside[:, None], other=0.0)
        product = tl.dot(x.to(tl.float32), y.to(tl.float32), product, input_precision="ieee")
    return product


@triton.jit
def masked(w, target, bit, j):
    """The pairs that are no negatives; what lies past the end has w or bit 0."""
    suspect = (w < 0) & ((bit & 2) != 0)
    return ((bit & 1) == 0) | (w == 0) | suspect | (j == target)


@triton.jit
def lse_lines(
    lines, others, owner, weight, bits, scale, sums, counts, out,
    line, line_count, other_count, depth, offset,
    ROWS: tl.constexpr, LINES: tl.constexpr, OTHERS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    inside = line < line_count
    fix = needs_fixing(tl.load(sums + line, mask=inside, other=1.0))
    fix &= tl.load(counts + line, mask=inside, other=0.0) != 0
    result = tl.zeros((LINES,), tl.float32)
    if tl.max(fix.to(tl.int32), 0) > 0:
        s = tl.load(scale)
        shift = score_shift(s)
        top = tl.full((LINES,), float("-inf"), tl.float32)
        base = tl.zeros((LINES,), tl.float32)
        total = tl.zeros((LINES,), tl.float32)
        for start in range(0, other_count, OTHERS):
            other = start + tl.arange(0, OTHERS)
            there = other < other_count
            if ROWS:
                w = tl.load(weight + line, mask=inside, other=0.0)[:, None]
                target = tl.load(owner + line, mask=inside, other=0)[:, None] + offset
                bit = tl.load(bits + other, mask=there, other=0).to(tl.int32)[None, :]
                off = masked(w, target, bit, other[None, :])
            else:
                w = tl.load(weight + other, mask=there, other=0.0)[None, :]
                target = tl.load(owner + other, mask=there, other=0)[None, :] + offset
                bit = tl.load(bits + line, mask=inside, other=0).to(tl.int32)[:, None]
                off = masked(w, target, bit, line[:, None]) | (w <= 0)
            if tl.min(tl.min(off.to(tl.int32), 1), 0) == 0:
                product = scores(
                    lines, others, line, other, line_count, other_count, depth, LINES, OTHERS, STEP
                )
                value = tl.where(off, float("-inf"), product * s - shift)
                top = tl.maximum(top, tl.max(value, 1))
                new = tl.where(tl.abs(top) == float("inf"), 0.0, top)
                total = tl.where(total == 0, 0.0, total * exp(base - new))
                total += tl.sum(exp(value - new[:, None]), 1)
                base = new
        result = tl.where(total == 0, float("-inf"), base + tl.log(total))
    tl.store(out + line, tl.where(fix, result, 0.0), mask=inside)


@triton.jit(do_not_specialize=LSE_SIZES)
def lse_kernel(
    that,  # [text_rows, depth] matrix dtype
    ihat,  # [columns, depth] matrix dtype
    owner,  # [text_rows] int32
    weight,  # [text_rows] fp32
    column_weight,  # [columns] fp32
    bits,  # [columns] uint8
    scale,  # [] fp32
    r,  # [text_rows] fp32
    c,  # [columns] fp32
    row_lse,  # [text_rows] fp32
    col_lse,  # [columns] fp32
    text_rows,
    columns,
    depth,
    offset,
    LINES: tl.constexpr,
    OTHERS: tl.constexpr,
    STEP: tl.constexpr,
):
    block = tl.program_id(0)
    row_blocks = tl.cdiv(text_rows, LINES)
    if block < row_blocks:
        line = block * LINES + tl.arange(0, LINES)
        lse_lines(that, ihat, owner, weight, bits, scale, r, weight, row_lse,
                  line, text_rows, columns, depth, offset, True, LINES, OTHERS, STEP)  # fmt: skip
    else:
        line = (block - row_blocks) * LINES + tl.arange(0, LINES)
        lse_lines(ihat, that, owner, weight, bits, scale, c, column_weight, col_lse,
                  line, columns, text_rows, depth, offset, False, LINES, OTHERS, STEP)  # fmt: skip


@triton.jit
def fix_lines(
    lines, others, owner, weight, bits, scale, line_fix, other_fix, line_lse, other_lse, out,
    line, first_d, line_count, other_count, depth, offset,
    ROWS: tl.constexpr, LINES: tl.constexpr, OTHERS: tl.constexpr, STEP: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    inside = line < line_count
    s = tl.load(scale)
    shift = score_shift(s)
    own_fix = tl.load(line_fix + line, mask=inside, other=0.0)
    own_lse = tl.load(line_lse + line, mask=inside, other=0.0)
    some = tl.max((own_fix != 0).to(tl.int32), 0)
    d = first_d + tl.arange(0, WIDTH)
    total = tl.zeros((LINES, WIDTH), tl.float32)
    for start in range(0, other_count, OTHERS):
        other = start + tl.arange(0, OTHERS)
        there = other < other_count
        fix = tl.load(other_fix + other, mask=there, other=0.0)
        if some + tl.max((fix != 0).to(tl.int32), 0) > 0:
            product = scores(
                lines, others, line, other, line_count, other_count, depth, LINES, OTHERS, STEP
            )
            value = product * s - shift
            sums = tl.load(other_lse + other, mask=there, other=0.0)
            own = tl.where((own_fix == 0)[:, None], 0.0,
                           own_fix[:, None] * exp(value - own_lse[:, None]))  # fmt: skip
            their = tl.where((fix == 0)[None, :], 0.0,
                             fix[None, :] * exp(value - sums[None, :]))  # fmt: skip
            if ROWS:  # their part is the columns', which rows with weight > 0 take
                w = tl.load(weight + line, mask=inside, other=0.0)[:, None]
                target = tl.load(owner + line, mask=inside, other=0)[:, None] + offset
                bit = tl.load(bits + other, mask=there, other=0).to(tl.int32)[None, :]
                off = masked(w, target, bit, other[None, :])
                their = tl.where(w > 0, their, 0.0)
            else:
                w = tl.load(weight + other, mask=there, other=0.0)[None, :]
                target = tl.load(owner + other, mask=there, other=0)[None, :] + offset
                bit = tl.load(bits + line, mask=inside, other=0).to(tl.int32)[:, None]
                off = masked(w, target, bit, line[:, None])
                own = tl.where(w > 0, own, 0.0)
            part = tl.where(off, 0.0, own + their)
            at = others + other.to(tl.int64)[:, None] * depth + d[None, :]
            hat = tl.load(at, mask=there[:, None] & (d < depth)[None, :], other=0.0)
            total = tl.dot(part, hat.to(tl.float32), total, input_precision="ieee")
    at = out + line.to(tl.int64)[:, None] * depth + d[None, :]
    mask = inside[:, None] & (d < depth)[None, :]
    tl.store(at, tl.load(at, mask=mask, other=0.0) + total, mask=mask)


@triton.jit(do_not_specialize=FIX_SIZES)
def fix_kernel(
    that,  # [text_rows, depth] matrix dtype
    ihat,  # [columns, depth] matrix dtype
    owner,  # [text_rows] int32
    weight,  # [text_rows] fp32
    bits,  # [columns] uint8
    scale,  # [] fp32
    row_fix,  # [text_rows] fp32
    col_fix,  # [columns] fp32
    row_lse,  # [text_rows] fp32
    col_lse,  # [columns] fp32
    flagged,  # [2] int32
    g_text,  # [text_rows, depth] fp32
    g_image,  # [columns, depth] fp32
    text_rows,
    columns,
    depth,
    offset,
    text_programs,  # 0 where only g_image is wanted
    LINES: tl.constexpr,
    OTHERS: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0)
    slices = tl.cdiv(depth, WIDTH)
    if (tl.load(flagged) != 0) | (tl.load(flagged + 1) != 0):
        if program < text_programs:
            line = program // slices * LINES + tl.arange(0, LINES)
            fix_lines(that, ihat, owner, weight, bits, scale, row_fix, col_fix, row_lse, col_lse,
                      g_text, line, program % slices * WIDTH, text_rows, columns, depth, offset,
                      True, LINES, OTHERS, STEP, WIDTH)  # fmt: skip
        else:
            program -= text_programs
            line = program // slices * LINES + tl.arange(0, LINES)
            fix_lines(ihat, that, owner, weight, bits, scale, col_fix, row_fix, col_lse, row_lse,
                      g_image, line, program % slices * WIDTH, columns, text_rows, depth, offset,
                      False, LINES, OTHERS, STEP, WIDTH)  # fmt: skip


def lse(
    p: Any, that: Tensor, ihat: Tensor, r: Tensor, c: Tensor, row_lse: Tensor, col_lse: Tensor
) -> None:
    """log of the sums that need fixing, formed with an online maximum; 0 elsewhere.

    Args:
        p: the Problem.
        that, ihat: [M, D] and [A, D], fp32 or bf16.
        r, c: [M] and [A] fp32.
        row_lse, col_lse: [M] and [A] fp32, written.
    """
    rows, columns = len(r), len(c)
    lines = SHAPE["LINES"]
    lse_kernel[(triton.cdiv(rows, lines) + triton.cdiv(columns, lines),)](
        that, ihat, p.owner, p.weight, p.column_weight, p.bits, p.scale, r, c, row_lse, col_lse,
        rows, columns, that.shape[1], p.offset, **SHAPE,
        num_warps=4, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip


def fixup(
    p: Any, that: Tensor, ihat: Tensor, row_fix: Tensor, col_fix: Tensor, row_lse: Tensor,
    col_lse: Tensor, flagged: Tensor, g_text: Tensor | None, g_image: Tensor | None,
) -> None:  # fmt: skip
    """Adds the dS of fixed lines to the gradients' matrix part, in index order.

    Args:
        p: the Problem.
        that, ihat: [M, D] and [A, D], fp32 or bf16.
        row_fix, row_lse: [M] fp32; col_fix, col_lse: [A] fp32.
        flagged: [2] int32; where both are 0 nothing is read but them.
        g_text, g_image: [M, D] and [A, D] fp32, added to; either may be None.
    """
    rows, columns, depth = len(that), len(ihat), that.shape[1]
    slices = triton.cdiv(depth, WIDTH)
    text = triton.cdiv(rows, SHAPE["LINES"]) * slices if g_text is not None else 0
    images = triton.cdiv(columns, SHAPE["LINES"]) * slices if g_image is not None else 0
    if text + images == 0:
        return
    fix_kernel[(text + images,)](
        that, ihat, p.owner, p.weight, p.bits, p.scale, row_fix, col_fix, row_lse, col_lse,
        flagged, g_text if text else g_image, g_image if images else g_text, rows, columns, depth,
        p.offset, text, **SHAPE, WIDTH=WIDTH, num_warps=4, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip


def variants() -> list[Variant]:
    """Every kernel and configuration that the launchers above can choose."""
    found = []
    for hat in ("*fp32", "*bf16"):
        for kernel, name, sizes, constexprs in (
            (lse_kernel, "lse", LSE_SIZES, SHAPE),
            (fix_kernel, "fixup", FIX_SIZES, SHAPE | {"WIDTH": WIDTH}),
        ):
            types = types_of(kernel, sizes, {"that": hat, "ihat": hat})
            full = f"{name}_{hat[1:]}"
            found.append(Variant(kernel, full, types, constexprs, 4, 2, forms=("aligned",)))
    return found
