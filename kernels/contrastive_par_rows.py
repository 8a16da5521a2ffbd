"""contrastive_par, first and last stage: unit rows with their scores, and the inputs' gradients.

Map: a program per row, both towers in one launch; its features stay in registers.
Bound: memory; each feature is read once or twice (a text row reads its image's) and written once.
Why: eager normalises, gathers and projects in some twenty launches of several passes each.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pybackdoor.kernels._contrastive_par_math import types_of
from pybackdoor.kernels._variant import Variant

__all__ = ["normalize_backward", "prep", "variants"]

EPS = tl.constexpr(1e-12)  # smallest norm that a row is divided by
BLOCKS = {512: 2, 1024: 4, 4096: 16}  # features that a program holds: its warps
UNIT = 16  # a depth that is a multiple of it is read 16 bytes at a time
DTYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
PREP_SIZES = "text_rows depth offset normalize has_text_ref has_image_ref".split()
BACKWARD_SIZES = "text_programs depth offset normalize has_text_ref has_image_ref".split()


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
                types = types_of(prep_kernel, PREP_SIZES, special)
                name = f"prep_{dtype[1:]}_{hat[1:]}_{unit}_{block}"
                found.append(Variant(prep_kernel, name, types, constexprs, **launch))
            special = dict.fromkeys((*inputs, "d_text", "d_image"), dtype)
            types = types_of(backward_kernel, BACKWARD_SIZES, special)
            name = f"backward_{dtype[1:]}_{unit}_{block}"
            found.append(Variant(backward_kernel, name, types, constexprs, **launch))
    return found
