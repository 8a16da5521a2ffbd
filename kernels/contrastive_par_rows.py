"""contrastive_par, memory-bound stages: units and distances, sums, factors of dS, input gradients.

Map: a program per row of either tower (prep, normalize_backward) or per block of rows and images.
Bound: memory; each feature is read once or twice and each gradient written once.
Why: eager normalises, gathers, masks and reduces in some forty launches.
Every sum is formed in a fixed order; the one atomic adds integers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pybackdoor.kernels._contrastive_par_math import exp, score_shift, sigmoid, softplus
from pybackdoor.kernels._variant import Variant

__all__ = ["close", "finalise", "normalize_backward", "prep", "sums", "totals", "variants"]

EPS = tl.constexpr(1e-12)  # smallest norm that a row is divided by
TINY = tl.constexpr(math.exp(-70))  # smaller sums are formed again, with a shift of their own
BLOCKS = {512: 2, 1024: 4, 4096: 8}  # features that a program holds: its warps
UNIT = 16  # a depth that is a multiple of it is read 16 bytes at a time
BLOCK, STEP = 128, 8  # columns and slices of partials that a program reads at once
TOTAL = 4096  # rows that the one program of totals reads at once
DTYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
PREP_SIZES = "text_rows depth offset normalize has_text_ref has_image_ref".split()
SUM_SIZES = "row_slices col_slices text_rows columns images".split()
FINALISE_SIZES = "text_rows columns images offset".split()
TOTAL_SIZES = "text_rows images offset".split()
BACKWARD_SIZES = "text_programs depth offset normalize has_text_ref has_image_ref".split()


@triton.jit
def needs_fixing(x):
    return (x < TINY) | (x == float("inf"))


@triton.jit
def load_row(x, row, depth, d):
    return tl.load(x + row * depth.to(tl.int64) + d, mask=d < depth, other=0.0).to(tl.float32)


@triton.jit
def inverse_norm(x, normalize):
    norm = tl.sqrt_rn(tl.sum(x * x))
    inverse = tl.div_rn(1.0, tl.where(norm < EPS, EPS, norm))  # a NaN stays
    return tl.where(normalize != 0, inverse, 1.0)


@triton.jit
def square_distance(unit, ref, row, depth, d, wanted):
    other = tl.load(ref + row * depth.to(tl.int64) + d, mask=d < depth * wanted, other=0.0)
    apart = unit - other.to(tl.float32)
    return tl.where(wanted != 0, tl.sum(apart * apart), 0.0)


@triton.jit(do_not_specialize=PREP_SIZES)
def prep_kernel(
    text,  # [M, depth] dtype
    image,  # [N, depth] dtype
    text_ref,  # [M, depth] dtype, not read unless has_text_ref
    image_ref,  # [N, depth] dtype
    owner,  # [M] int32
    bits,  # [A] uint8
    scale,  # [] fp32
    that,  # [M, depth] matrix dtype
    ihat,  # [N, depth] matrix dtype
    inv_text,  # [M] fp32
    inv_image,  # [N] fp32
    target,  # [M] fp32
    dist_text,  # [M] fp32
    dist_image,  # [N] fp32
    flagged,  # [2] int32
    text_rows,
    depth,  # in units
    offset,
    normalize,
    has_text_ref,
    has_image_ref,
    UNIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    depth *= UNIT
    program = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    if program == 0:
        tl.store(flagged + tl.arange(0, 2), tl.zeros((2,), tl.int32))
    if program < text_rows:
        own = tl.load(owner + program)
        x = load_row(text, program, depth, d)
        inverse = inverse_norm(x, normalize)
        unit = x * inverse
        y = load_row(image, own, depth, d)
        score = tl.load(scale) * tl.sum(unit * (y * inverse_norm(y, normalize)))
        wanted = (tl.load(bits + offset + own).to(tl.int32) & 1) * has_text_ref
        distance = square_distance(unit, text_ref, program, depth, d, wanted)
        at = that + program * depth.to(tl.int64) + d
        tl.store(at, unit.to(that.dtype.element_ty), mask=d < depth)
        tl.store(inv_text + program, inverse)
        tl.store(target + program, score)
        tl.store(dist_text + program, distance)
    else:
        row = program - text_rows
        x = load_row(image, row, depth, d)
        inverse = inverse_norm(x, normalize)
        unit = x * inverse
        wanted = (tl.load(bits + offset + row).to(tl.int32) & 1) * has_image_ref
        distance = square_distance(unit, image_ref, row, depth, d, wanted)
        at = ihat + row * depth.to(tl.int64) + d
        tl.store(at, unit.to(ihat.dtype.element_ty), mask=d < depth)
        tl.store(inv_image + row, inverse)
        tl.store(dist_image + row, distance)


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


@triton.jit
def finish_row(
    h, unit, inverse, ref, out, dot, row, depth, d, grad, factor, apart, normalize
):  # fmt: skip
    """The distance part and the normalisation; h and unit are 0 past the end."""
    tl.store(dot + row, grad * tl.sum(h * unit))
    other = tl.load(ref + row * depth.to(tl.int64) + d, mask=d < depth * apart, other=0.0)
    h += tl.where(apart != 0, factor * (unit - other.to(tl.float32)), 0.0)
    projected = h - tl.sum(h * unit) * unit
    h = tl.where((normalize != 0) & (inverse < 1 / EPS), projected, h)
    value = (grad * h * inverse).to(out.dtype.element_ty)
    tl.store(out + row * depth.to(tl.int64) + d, value, mask=d < depth)


@triton.jit
def distance_factor(distance_weight, gate, count):
    return tl.div_rn(-2.0 * distance_weight * tl.load(gate), tl.maximum(tl.load(count), 1.0))


@triton.jit(do_not_specialize=BACKWARD_SIZES)
def backward_kernel(
    text,  # [M, depth] dtype
    image,  # [N, depth] dtype
    text_ref,  # [M, depth] dtype, not read unless has_text_ref
    image_ref,  # [N, depth] dtype
    owner,  # [M] int32
    segment,  # [N + 1] int32
    bits,  # [A] uint8
    scale,  # [] fp32
    inv_text,  # [M] fp32
    inv_image,  # [N] fp32
    coef,  # [M] fp32
    stats,  # [6] fp32
    total,  # [5] fp32
    grad,  # [] fp32
    g_text,  # [M, depth] fp32
    g_image,  # [N, depth] fp32
    d_text,  # [M, depth] dtype
    d_image,  # [N, depth] dtype
    dot_text,  # [M] fp32
    dot_image,  # [N] fp32
    distance_weight,
    text_programs,  # M, or 0 where only images are wanted
    depth,  # in units
    offset,
    normalize,
    has_text_ref,
    has_image_ref,
    UNIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    depth *= UNIT
    program = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    s, outer = tl.load(scale), tl.load(grad)
    if program < text_programs:
        own = tl.load(owner + program)
        inverse = tl.load(inv_text + program)
        unit = load_row(text, program, depth, d) * inverse
        share = tl.load(coef + program) * (
            load_row(image, own, depth, d) * tl.load(inv_image + own)
        )
        h = s * (load_row(g_text, program, depth, d) + share)
        apart = (tl.load(bits + offset + own).to(tl.int32) & 1) * has_text_ref
        factor = distance_factor(distance_weight, stats + 5, total + 2)
        finish_row(h, unit, inverse, text_ref, d_text, dot_text, program, depth, d, outer, factor,
                   apart, normalize)  # fmt: skip
    else:
        row = program - text_programs
        inverse = tl.load(inv_image + row)
        unit = load_row(image, row, depth, d) * inverse
        share = tl.zeros((BLOCK_D,), tl.float32)
        for i in range(tl.load(segment + row), tl.load(segment + row + 1)):
            part = load_row(text, i, depth, d) * tl.load(inv_text + i)
            share += tl.load(coef + i) * part
        h = s * (load_row(g_image, row, depth, d) + share)
        apart = (tl.load(bits + offset + row).to(tl.int32) & 1) * has_image_ref
        factor = distance_factor(distance_weight, stats + 4, total + 4)
        finish_row(h, unit, inverse, image_ref, d_image, dot_image, row, depth, d, outer, factor,
                   apart, normalize)  # fmt: skip


def _features(*tensors: Tensor | None) -> dict[str, Any]:
    """depth in units, and the launch arguments for rows of features."""
    given = [t for t in tensors if t is not None]
    depth = given[0].shape[1]
    if depth > max(BLOCKS):
        raise ValueError(f"contrastive_par: D must be at most {max(BLOCKS)} in Triton, got {depth}")
    if depth % UNIT or any(t.data_ptr() % 16 for t in given):
        unit, block = 1, max(BLOCKS)
    else:
        unit, block = UNIT, min(b for b in BLOCKS if b >= depth)
    return {"depth": depth // unit, "UNIT": unit, "BLOCK_D": block, "num_warps": BLOCKS[block],
            "num_stages": 1, "enable_fp_fusion": True}  # fmt: skip


def prep(
    p: Any, that: Tensor, ihat: Tensor, inv_text: Tensor, inv_image: Tensor, target: Tensor,
    dist_text: Tensor, dist_image: Tensor, flagged: Tensor,
) -> None:  # fmt: skip
    """Unit rows in the matrix dtype, 1/norms, target scores, squared distances; clears flagged.

    Args:
        p: the Problem, in fp32 but for the features; D at most 4096.
        that, ihat: [M, D] and [N, D], fp32 or bf16.
        inv_text, target, dist_text: [M] fp32.
        inv_image, dist_image: [N] fp32.
        flagged: [2] int32.
    """
    rows = len(p.text)
    prep_kernel[(rows + len(p.image),)](
        p.text, p.image, p.text if p.text_ref is None else p.text_ref,
        p.image if p.image_ref is None else p.image_ref, p.owner, p.bits, p.scale, that, ihat,
        inv_text, inv_image, target, dist_text, dist_image, flagged, text_rows=rows,
        offset=p.offset, normalize=int(p.normalize), has_text_ref=int(p.text_ref is not None),
        has_image_ref=int(p.image_ref is not None),
        **_features(p.text, p.image, p.text_ref, p.image_ref, that, ihat),
    )  # fmt: skip


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


def normalize_backward(
    p: Any, inv_text: Tensor, inv_image: Tensor, coef: Tensor, stats: Tensor, total: Tensor,
    grad: Tensor, distance_weight: float, g_text: Tensor | None, g_image: Tensor | None,
    d_text: Tensor | None, d_image: Tensor | None, dot_text: Tensor | None,
    dot_image: Tensor | None,
) -> None:  # fmt: skip
    """Gradients of the inputs: target part, distance part, then through the normalisation.

    Args:
        p: the Problem.
        inv_text, coef: [M] fp32; inv_image: [N] fp32.
        stats, total: [6] and [5] fp32, of all ranks; grad: [] fp32.
        g_text, g_image: [M, D] and [N, D] fp32: the matrix part of this rank's rows.
        d_text, d_image: [M, D] and [N, D] of the inputs' dtype, written; a tower whose d is None
            is left out, and its g and dot may be None.
        dot_text, dot_image: [M] and [N] fp32, written.
    """
    text = len(p.text) if d_text is not None else 0
    images = len(p.image) if d_image is not None else 0
    if text + images == 0:
        return
    some_g, some_d, some_dot = (g_text, d_text, dot_text) if text else (g_image, d_image, dot_image)
    backward_kernel[(text + images,)](
        p.text, p.image, p.text if p.text_ref is None else p.text_ref,
        p.image if p.image_ref is None else p.image_ref, p.owner, p.segment, p.bits, p.scale,
        inv_text, inv_image, coef, stats, total, grad,
        g_text if text else some_g, g_image if images else some_g,
        d_text if text else some_d, d_image if images else some_d,
        dot_text if text else some_dot, dot_image if images else some_dot, float(distance_weight),
        text_programs=text, offset=p.offset, normalize=int(p.normalize),
        has_text_ref=int(p.text_ref is not None), has_image_ref=int(p.image_ref is not None),
        **_features(p.text, p.image, p.text_ref, p.image_ref, some_g, some_d),
    )  # fmt: skip


def _types(kernel: Any, sizes: list[str], special: dict[str, str]) -> dict[str, str]:
    """The kernel's signature: pointers to fp32 but for the special ones and the sizes."""
    integers = {"owner": "*i32", "segment": "*i32", "bits": "*u8", "flagged": "*i32"}
    scalars = {"distance_weight": "fp32", "tau": "fp32"} | dict.fromkeys(sizes, "i32")
    known = integers | scalars | special
    return {n: known.get(n, "*fp32") for n in kernel.arg_names if not n.isupper()}


def variants() -> list[Variant]:
    """Every kernel and configuration that the launchers above can choose."""
    found = []
    shapes = [(UNIT, block) for block in BLOCKS] + [(1, max(BLOCKS))]
    inputs = ("text", "image", "text_ref", "image_ref")
    for unit, block in shapes:
        constexprs = {"UNIT": unit, "BLOCK_D": block}
        forms = ("aligned" if unit > 1 else "plain",)
        launch = {"num_warps": BLOCKS[block], "num_stages": 1, "forms": forms}
        for dtype in DTYPES.values():
            for hat in ("*fp32", "*bf16"):
                special = dict.fromkeys(inputs, dtype) | {"that": hat, "ihat": hat}
                types = _types(prep_kernel, PREP_SIZES, special)
                name = f"prep_{dtype[1:]}_{hat[1:]}_{unit}_{block}"
                found.append(Variant(prep_kernel, name, types, constexprs, **launch))
            special = dict.fromkeys((*inputs, "d_text", "d_image"), dtype)
            types = _types(backward_kernel, BACKWARD_SIZES, special)
            name = f"backward_{dtype[1:]}_{unit}_{block}"
            found.append(Variant(backward_kernel, name, types, constexprs, **launch))
    for kernel, name, sizes, constexprs, warps in (
        (sum_kernel, "sums", SUM_SIZES, {"BLOCK": BLOCK, "STEP": STEP}, 4),
        (finalise_kernel, "finalise", FINALISE_SIZES, {"BLOCK": BLOCK}, 4),
        (total_kernel, "totals", TOTAL_SIZES, {"BLOCK": TOTAL}, 8),
        (close_kernel, "close", [], {}, 1),
    ):
        types = _types(kernel, sizes, {})
        found.append(Variant(kernel, name, types, constexprs, warps, 1, forms=("aligned",)))
    return found
