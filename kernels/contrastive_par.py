"""contrastive_par, matrix stages: E = exp(s That Ihat^T - m) with its sums, and dS Ihat, dS^T That.

Map: a program per output tile, E's in groups of rows that stay in the L2; the gradients scale E in
    registers, where it is the product's A operand.
Bound: tensor cores; 2 B A D flop each, E written once and read once per gradient.
Why: eager holds several M x A matrices in fp32; here one in the matrix dtype, or a block of it.
Sums go to partial buffers, one slice per tile: no atomics, the same bits every time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pybackdoor.kernels._contrastive_par_math import LOG2E, exp, score_shift, types_of
from pybackdoor.kernels._variant import Variant, arch_of

__all__ = ["PRECISIONS", "exp_block", "gradients", "partials", "variants"]

PRECISIONS = ("bf16", "tf32", "tf32x3", "ieee")
GROUP = 8  # rows of tiles that share one sweep over the columns' tiles
UNIT = 16  # depth and stride that are multiples of it are read and written 16 bytes at a time
ENOUGH = 100  # large tiles that keep most of an H100's 132 multiprocessors busy
EXP_SIZES = "rows columns depth stride text_rows first offset store".split()
GRADIENT_SIZES = "rows columns depth stride first accumulate".split()


class Tile(NamedTuple):
    """An output tile, the depth of a step of the product, and how it is launched."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# By architecture and precision: the tile where there are enough of them, the one where there are
# not, and the one for sizes that are no multiples of UNIT, whose loads go through registers. The
# tiles of sm_80 fit the 99 KB of shared memory of its consumer relatives.
TILES = {
    (80, "bf16"): (Tile(128, 128, 32, 8, 4), Tile(64, 64, 64, 4, 3), Tile(64, 64, 16, 4, 1)),
    (80, "tf32"): (Tile(128, 128, 16, 8, 3), Tile(64, 64, 32, 4, 3), Tile(64, 64, 16, 4, 1)),
    (80, "tf32x3"): (Tile(64, 64, 16, 4, 1), Tile(64, 64, 16, 4, 1), Tile(64, 64, 16, 4, 1)),
    (80, "ieee"): (Tile(64, 64, 16, 4, 2), Tile(64, 64, 16, 4, 2), Tile(64, 64, 16, 4, 1)),
    (90, "bf16"): (Tile(128, 256, 64, 8, 3), Tile(64, 128, 64, 4, 3), Tile(64, 64, 32, 4, 1)),
    (90, "tf32"): (Tile(128, 256, 32, 8, 3), Tile(64, 128, 32, 4, 3), Tile(64, 64, 32, 4, 2)),
    (90, "tf32x3"): (Tile(128, 64, 32, 8, 2), Tile(64, 64, 32, 4, 2), Tile(64, 64, 16, 4, 1)),
    (90, "ieee"): (Tile(64, 64, 32, 4, 2), Tile(64, 64, 32, 4, 2), Tile(64, 64, 32, 4, 1)),
}


@triton.jit(do_not_specialize=EXP_SIZES)
def exp_kernel(
    that,  # [rows, depth] matrix dtype
    ihat,  # [columns, depth] matrix dtype
    owner,  # [text_rows] int32
    weight,  # [text_rows] fp32
    bits,  # [columns] uint8: valid 1, suspect 2
    scale,  # [] fp32
    e,  # [rows, stride] matrix dtype, not touched unless store; 0 past the columns
    row_partial,  # [cdiv(columns, BN), text_rows] fp32
    col_partial,  # [cdiv(rows, BM), columns] fp32
    rows,
    columns,
    depth,  # in units, as stride
    stride,
    text_rows,
    first,
    offset,
    store,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    depth *= UNIT
    stride *= UNIT
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(rows, BM), tl.cdiv(columns, BN)
    group = pid // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    tile_m = group * GROUP + (pid % (GROUP * tiles_n)) % height
    tile_n = (pid % (GROUP * tiles_n)) // height

    # Scalar 64-bit bases with 32-bit offsets inside the tile cost half the registers.
    first_row, first_column = tile_m * BM, tile_n * BN
    x, y = tl.arange(0, BM), tl.arange(0, BN)
    k = tl.arange(0, BK)
    a_base = that + first_row.to(tl.int64) * depth
    b_base = ihat + first_column.to(tl.int64) * depth
    # Rows past the end read the last one again; what they give is masked below.
    a_offset = tl.minimum(x, rows - 1 - first_row)[:, None] * depth + k[None, :]
    b_offset = tl.minimum(y, columns - 1 - first_column)[None, :] * depth + k[:, None]
    accumulator = tl.zeros((BM, BN), tl.float32)
    for start in range(0, depth, BK):
        inside = k < depth - start
        accumulator = tl.dot(
            tl.load(a_base + start + a_offset, mask=inside[None, :], other=0.0),
            tl.load(b_base + start + b_offset, mask=inside[:, None], other=0.0),
            accumulator,
            input_precision="tf32" if PRECISION == "bf16" else PRECISION,
        )

    i, j = first_row + x, first_column + y
    s = tl.load(scale)
    shift = score_shift(s)
    row_in, column_in = i < rows, j < columns
    w = tl.load(weight + first + i, mask=row_in, other=0.0)
    target = tl.load(owner + first + i, mask=row_in, other=0) + offset
    bit = tl.load(bits + j, mask=column_in, other=0).to(tl.int32)
    # A pair is no negative if a condition of its column meets one that its row minds.
    condition = tl.where((bit & 1) == 0, 1, 0) | (bit & 2) | 4
    minds = tl.where(w == 0, 4, 1) | tl.where(w < 0, 2, 0)
    off = ((condition[None, :] & minds[:, None]) != 0) | (j[None, :] == target[:, None])
    if PRECISION == "bf16" or PRECISION == "tf32":
        value = tl.exp2(accumulator * (s * LOG2E) - shift * LOG2E)
    else:
        value = exp(accumulator * s - shift)
    value = tl.where(off, 0.0, value)
    if store:
        at = e + first_row.to(tl.int64) * stride + first_column + (x[:, None] * stride + y[None, :])
        tl.store(at, value.to(e.dtype.element_ty), mask=row_in[:, None] & (j < stride)[None, :])
    row_at = row_partial + tile_n.to(tl.int64) * text_rows + first + i
    tl.store(row_at, tl.sum(value, 1), mask=row_in)
    positive = tl.where((w > 0)[:, None], value, 0.0)
    column_at = col_partial + tile_m.to(tl.int64) * columns + j
    tl.store(column_at, tl.sum(positive, 0), mask=column_in)


@triton.jit
def halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile's columns; no data moves between threads."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit(do_not_specialize=GRADIENT_SIZES)
def gradient_kernel(
    e,  # [rows, stride] matrix dtype, 0 past the columns
    hat,  # TEXT: ihat [columns, depth], else that [rows, depth]; matrix dtype
    weight,  # [M] fp32
    alpha,  # [M] fp32
    beta,  # [columns] fp32
    out,  # TEXT: [rows, depth], else [columns, depth]; fp32
    rows,
    columns,
    depth,  # in units, as stride
    stride,
    first,
    accumulate,
    TEXT: tl.constexpr,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    depth *= UNIT
    stride *= UNIT
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(depth, BN)
    first_line = pid // tiles_n * BM  # neighbours read the same lines of E
    first_d = pid % tiles_n * BN
    x, y = tl.arange(0, BM), tl.arange(0, BN)
    k = tl.arange(0, BK)
    m, d_in = first_line + x, y < depth - first_d
    # A line's own factor; the loop loads the other one's.
    if TEXT:
        lines, length = rows, columns
        own = tl.load(alpha + first + m, mask=m < rows, other=0.0)
        positive = tl.load(weight + first + m, mask=m < rows, other=0.0) > 0
        a_base = e + first_line.to(tl.int64) * stride
        a_offset = tl.minimum(x, rows - 1 - first_line)[:, None] * stride + k[None, :]
    else:
        lines, length = columns, rows
        own = tl.load(beta + m, mask=m < columns, other=0.0)
        a_base = e + first_line
        a_offset = k[None, :] * stride + x[:, None]
    b_base = hat + first_d
    b_offset = k[:, None] * depth + y[None, :]
    accumulator = tl.zeros((BM, BN), tl.float32)
    for start in range(0, length, BK):
        inside = k < length - start
        if TEXT:
            value = tl.load(a_base + a_offset, mask=(k < stride - start)[None, :], other=0.0)
            other = tl.load(beta + start + k, mask=inside, other=0.0)
            factor = own[:, None] + tl.where(positive[:, None], other[None, :], 0.0)
            a_base += BK
        else:
            there = inside[None, :] & (x < stride - first_line)[:, None]
            value = tl.load(a_base + a_offset, mask=there, other=0.0)
            other = tl.load(alpha + first + start + k, mask=inside, other=0.0)
            w = tl.load(weight + first + start + k, mask=inside, other=0.0)
            factor = other[None, :] + tl.where((w > 0)[None, :], own[:, None], 0.0)
            a_base += stride.to(tl.int64) * BK
        scaled = tl.where(factor == 0, 0.0, value.to(tl.float32) * factor)
        accumulator = tl.dot(
            scaled.to(e.dtype.element_ty),
            tl.load(b_base + b_offset, mask=inside[:, None] & d_in[None, :], other=0.0),
            accumulator,
            input_precision="tf32" if PRECISION == "bf16" else PRECISION,
        )
        b_base += depth.to(tl.int64) * BK
    # By quarters: a whole tile's old values beside the new ones do not fit into the registers.
    left, right = halves(accumulator, BM, BN)
    width: tl.constexpr = BN // 4
    y = tl.arange(0, width)
    at = out + first_line.to(tl.int64) * depth + first_d + (x[:, None] * depth + y[None, :])
    for half in tl.static_range(2):
        first_quarter, second_quarter = halves(left if half == 0 else right, BM, BN // 2)
        for quarter in tl.static_range(2):
            value = first_quarter if quarter == 0 else second_quarter
            skip = (2 * half + quarter) * width
            mask = (m < lines)[:, None] & (y < depth - first_d - skip)[None, :]
            if accumulate:
                value += tl.load(at + skip, mask=mask, other=0.0)
            tl.store(at + skip, value, mask=mask)


def _choose(
    device: torch.device, precision: str, lines: int, columns: int, *sizes: int
) -> tuple[Tile, int]:
    """The tile for an output [lines, columns], and the unit that all sizes are multiples of."""
    if precision not in PRECISIONS:
        raise ValueError(
            f"contrastive_par: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}"
        )
    large, small, odd = TILES[arch_of(device), precision]
    if any(size % UNIT for size in sizes):
        return odd, 1
    tiles = triton.cdiv(lines, large.rows) * triton.cdiv(columns, large.columns)
    return (large if tiles >= ENOUGH else small), UNIT


def _stride(p: Any, e: Tensor | None) -> int:
    return triton.cdiv(len(p.bits), UNIT) * UNIT if e is None else e.stride(0)


def partials(p: Any, rows: int, precision: str, e: Tensor | None) -> tuple[int, int]:
    """(Kr, Kc): the slices of row_partial [Kr, M], and of col_partial [Kc, A] for a block of rows.

    Args:
        p: the Problem.
        rows: of the block.
        precision: as exp_block's.
        e: as exp_block's; only whether it is None, and its stride, matter.
    """
    columns = len(p.bits)
    depth = p.text.shape[1]
    tile, _ = _choose(p.text.device, precision, len(p.text), columns, depth, _stride(p, e))
    return triton.cdiv(columns, tile.columns), triton.cdiv(rows, tile.rows)


def exp_block(
    p: Any,
    that: Tensor,
    ihat: Tensor,
    first: int,
    e: Tensor | None,
    row_partial: Tensor,
    col_partial: Tensor,
    precision: str,
) -> None:
    """E = exp(S - m) of text rows first .. first + B - 1, 0 where masked; and its partial sums.

    Args:
        p: the Problem: text [M, D] on, in fp32.
        that, ihat: [B, D], the block's rows, and [A, D]; bf16 for precision bf16, else fp32.
        first: the block's first row.
        e: [B, A] like that, or None where only the sums are wanted. Its rows may be further apart
            than A: a stride that is a multiple of 16 is faster; what lies between them becomes 0.
        row_partial: [Kr, M] fp32; columns first .. first + B - 1 are written.
        col_partial: [Kc, A] fp32. Kr and Kc are those of `partials`.
        precision: bf16, tf32, tf32x3 or ieee.
    """
    (rows, depth), columns, stride = that.shape, len(ihat), _stride(p, e)
    tile, unit = _choose(that.device, precision, len(p.text), columns, depth, stride)
    tiles = triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns)
    if len(row_partial) != tiles[1] or len(col_partial) != tiles[0]:
        raise ValueError(
            f"contrastive_par: row_partial and col_partial must have {tiles[1]} and {tiles[0]} "
            f"slices, got {len(row_partial)} and {len(col_partial)}"
        )
    exp_kernel[(tiles[0] * tiles[1],)](
        that, ihat, p.owner, p.weight, p.bits, p.scale, that if e is None else e,
        row_partial, col_partial, rows, columns, depth // unit, stride // unit, len(p.text), first,
        p.offset, int(e is not None),
        UNIT=unit, BM=tile.rows, BN=tile.columns, BK=tile.depth, GROUP=GROUP, PRECISION=precision,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def gradients(
    p: Any,
    that: Tensor,
    ihat: Tensor,
    e: Tensor,
    first: int,
    alpha: Tensor,
    beta: Tensor,
    g_text: Tensor | None,
    g_image: Tensor | None,
    precision: str,
    accumulate: bool,
) -> None:
    """g_text = dS Ihat and g_image (+)= dS^T That, dS_ij = E_ij (alpha_i + [w_i > 0] beta_j).

    A factor of exactly 0 gives 0 even where E is infinite. One program owns each output tile.

    Args:
        p, that, ihat, e, first: as exp_block wrote e; never None.
        alpha, beta: [M] and [A] fp32.
        g_text: [B, D] fp32, the block's rows, or None.
        g_image: [A, D] fp32, or None.
        precision: as exp_block's.
        accumulate: add to g_image, as the second and later blocks of rows do.
    """
    (rows, depth), columns, stride = that.shape, len(ihat), e.stride(0)
    for text, hat, out in ((True, ihat, g_text), (False, that, g_image)):
        if out is None:
            continue
        lines = len(out)
        tile, unit = _choose(that.device, precision, lines, depth, depth, stride)
        tiles = triton.cdiv(lines, tile.rows) * triton.cdiv(depth, tile.columns)
        gradient_kernel[(tiles,)](
            e, hat, p.weight, alpha, beta, out, rows, columns, depth // unit, stride // unit, first,
            int(accumulate and not text),
            TEXT=text, UNIT=unit, BM=tile.rows, BN=tile.columns, BK=tile.depth, PRECISION=precision,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip


def variants() -> list[Variant]:
    """Every kernel and configuration that the launchers above can choose."""
    found = {}
    for (arch, precision), tiles in TILES.items():
        x = "*bf16" if precision == "bf16" else "*fp32"
        exp_types = types_of(exp_kernel, EXP_SIZES, {"that": x, "ihat": x, "e": x})
        types = types_of(gradient_kernel, GRADIENT_SIZES, {"e": x, "hat": x})
        for tile, unit in zip(tiles, (UNIT, UNIT, 1), strict=True):
            sizes = {"UNIT": unit, "BM": tile.rows, "BN": tile.columns, "BK": tile.depth}
            sizes["PRECISION"] = precision
            launch = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "matmul": True}
            launch |= {"archs": (arch,), "forms": ("aligned" if unit > 1 else "plain",)}
            name = "_".join(map(str, (arch, precision, *tile, unit)))
            for kernel, kind, signature, more in (
                (exp_kernel, "exp", exp_types, {"GROUP": GROUP}),
                (gradient_kernel, "text", types, {"TEXT": True}),
                (gradient_kernel, "image", types, {"TEXT": False}),
            ):
                full = f"{kind}_{name}"
                found[full] = Variant(kernel, full, signature, sizes | more, **launch)
    return list(found.values())
