"""The native stages of contrastive_par: tensors to addresses.

Each function writes into the tensors it is given, contiguous and on the problem's device; shapes
stand in the signatures' comments. exp_block and scale_block exist on the CPU only, where torch
does the products between them. The callers have checked everything; the native side checks again
only what would make it read astray.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from pybackdoor._native import _C
from pybackdoor.ops._contrastive_par_problem import Problem

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # DType in core/dtype.h


def _address(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _run(stage: str, p: Problem, tensors: dict[str, Tensor | None], **plain: object) -> str:
    """Calls a stage; returns what ran ("cuda", "avx512", ...)."""
    device = p.text.device
    shared = (p.text, p.image, p.text_ref, p.image_ref, p.owner, p.segment, p.weight)
    shared = (*shared, p.column_weight, p.bits, p.scale)
    assert all(t is None or t.device == device for t in (*shared, *tensors.values()))
    acc = torch.float64 if p.text.dtype == torch.float64 else torch.float32
    wide = (tensors.get(name) for name in ("scores", "e", "g_text", "g_image"))
    assert all(t is None or t.dtype == acc for t in wide)
    on_gpu = device.type == "cuda"
    return getattr(_C, f"contrastive_par_{stage}")(
        problem=[_address(t) for t in shared],
        sizes=(len(p.text), len(p.image), len(p.bits), p.text.shape[1], p.offset),
        normalize=p.normalize,
        dtype=DTYPES.index(p.text.dtype),
        **{name: _address(t) for name, t in tensors.items()},
        **plain,
        device=device.index if on_gpu else -1,
        stream=torch.cuda.current_stream(device).cuda_stream if on_gpu else 0,
        isa=os.environ.get("PYBACKDOOR_CPU_ISA") or "auto",
        threads=torch.get_num_threads(),
    )


def prep(
    p: Problem,
    that: Tensor,  # [M, D] matrix dtype
    ihat: Tensor,  # [N, D] matrix dtype
    inv_text: Tensor,  # [M] acc
    inv_image: Tensor,  # [N] acc
    target: Tensor,  # [M] acc
    dist_text: Tensor,  # [M] acc
    dist_image: Tensor,  # [N] acc
    flagged: Tensor,  # [2] int32
) -> str:
    """Unit rows, 1/norms, target scores S*, squared distances; clears flagged."""
    tensors = {"that": that, "ihat": ihat, "inv_text": inv_text, "inv_image": inv_image}
    tensors |= {"target": target, "dist_text": dist_text, "dist_image": dist_image}
    matrix = DTYPES.index(that.dtype)
    return _run("prep", p, tensors | {"flagged": flagged}, matrix_dtype=matrix)


def exp_block(
    p: Problem,
    scores: Tensor,  # [B, A] acc: unit text rows first .. first + B - 1 times all unit images
    first: int,
    row_partial: Tensor,  # [1, M] acc
    col_partial: Tensor,  # [1, A] acc
) -> str:
    """Turns scores into E = exp(s scores - m), 0 where masked, in place; sums of rows, columns.

    Entries first .. first + B - 1 of row_partial are written, and all of col_partial.
    """
    tensors = {"scores": scores, "row_partial": row_partial, "col_partial": col_partial}
    return _run("exp_block", p, tensors, first=first, block=len(scores))


def sums(
    p: Problem,
    row_partial: Tensor,  # [Kr, M] acc
    col_partial: Tensor,  # [Kc, A] acc
    target: Tensor,  # [M] acc
    r: Tensor,  # [M] acc
    c: Tensor,  # [A] acc
    log_p: Tensor,  # [N] acc
) -> str:
    """The partials' sums in order, and log P of this rank's images."""
    tensors = {"row_partial": row_partial, "col_partial": col_partial, "target": target}
    tensors |= {"r": r, "c": c, "log_p": log_p}
    return _run("sums", p, tensors, slices=(len(row_partial), len(col_partial)))


def lse(
    p: Problem,
    that: Tensor,  # [M, D] matrix dtype
    ihat: Tensor,  # [A, D] matrix dtype
    r: Tensor,  # [M] acc
    c: Tensor,  # [A] acc
    row_lse: Tensor,  # [M] acc
    col_lse: Tensor,  # [A] acc
) -> str:
    """log of the sums that need fixing, formed with an online maximum; 0 elsewhere."""
    tensors = {"that": that, "ihat": ihat, "r": r, "c": c}
    tensors |= {"row_lse": row_lse, "col_lse": col_lse}
    return _run("lse", p, tensors, matrix_dtype=DTYPES.index(that.dtype))


def finalise(
    p: Problem,
    target: Tensor,  # [M] acc
    r: Tensor,  # [M] acc
    c: Tensor,  # [A] acc
    log_p: Tensor,  # [A] acc
    row_lse: Tensor,  # [M] acc
    col_lse: Tensor,  # [A] acc
    alpha: Tensor,  # [M] acc
    beta: Tensor,  # [A] acc
    coef: Tensor,  # [M] acc
    row_fix: Tensor,  # [M] acc
    col_fix: Tensor,  # [A] acc
    loss_row: Tensor,  # [M] acc
    loss_col: Tensor,  # [N] acc
    flagged: Tensor,  # [2] int32
) -> str:
    """Loss parts and the factors of dS; adds the lines to be fixed to flagged."""
    tensors = {"target": target, "r": r, "c": c, "log_p": log_p}
    tensors |= {"row_lse": row_lse, "col_lse": col_lse, "alpha": alpha, "beta": beta}
    tensors |= {"coef": coef, "row_fix": row_fix, "col_fix": col_fix}
    tensors |= {"loss_row": loss_row, "loss_col": loss_col, "flagged": flagged}
    return _run("finalise", p, tensors)


def totals(
    p: Problem,
    loss_row: Tensor,  # [M] acc
    loss_col: Tensor,  # [N] acc
    dist_text: Tensor,  # [M] acc
    dist_image: Tensor,  # [N] acc
    out: Tensor,  # [5] acc
) -> str:
    """Contrastive loss; sum of dist_text, its count; sum of dist_image, its count."""
    tensors = {"loss_row": loss_row, "loss_col": loss_col}
    tensors |= {"dist_text": dist_text, "dist_image": dist_image, "total": out}
    return _run("totals", p, tensors)


def close(total: Tensor, distance_weight: float, tau: float, stats: Tensor) -> str:
    """stats [6] acc of total [5] acc: loss, contrastive, s_image, s_text, and the two gates."""
    device = total.device
    on_gpu = device.type == "cuda"
    return _C.contrastive_par_close(
        total=_address(total),
        stats=_address(stats),
        dtype=DTYPES.index(total.dtype),
        distance_weight=distance_weight,
        tau=tau,
        device=device.index if on_gpu else -1,
        stream=torch.cuda.current_stream(device).cuda_stream if on_gpu else 0,
        isa=os.environ.get("PYBACKDOOR_CPU_ISA") or "auto",
        threads=torch.get_num_threads(),
    )


def scale_block(
    p: Problem,
    e: Tensor,  # [B, A] acc
    alpha: Tensor,  # [M] acc
    beta: Tensor,  # [A] acc
    first: int,
    out: Tensor,  # [B, A] acc; may be e
) -> str:
    """out = E (alpha_i + [w_i > 0] beta_j); 0 where that factor is exactly 0."""
    tensors = {"e": e, "alpha": alpha, "beta": beta, "out": out}
    return _run("scale_block", p, tensors, first=first, block=len(e))


def fixup(
    p: Problem,
    that: Tensor,  # [M, D] matrix dtype
    ihat: Tensor,  # [A, D] matrix dtype
    row_fix: Tensor,  # [M] acc
    col_fix: Tensor,  # [A] acc
    row_lse: Tensor,  # [M] acc
    col_lse: Tensor,  # [A] acc
    flagged: Tensor,  # [2] int32
    g_text: Tensor | None,  # [M, D] acc
    g_image: Tensor | None,  # [A, D] acc
) -> str:
    """Adds the dS of fixed lines to the gradients' matrix part, in index order."""
    tensors = {"that": that, "ihat": ihat, "row_fix": row_fix, "col_fix": col_fix}
    tensors |= {"row_lse": row_lse, "col_lse": col_lse, "flagged": flagged}
    tensors |= {"g_text": g_text, "g_image": g_image}
    return _run("fixup", p, tensors, matrix_dtype=DTYPES.index(that.dtype))


def normalize_backward(
    p: Problem,
    inv_text: Tensor,  # [M] acc
    inv_image: Tensor,  # [N] acc
    coef: Tensor,  # [M] acc
    stats: Tensor,  # [6] acc
    total: Tensor,  # [5] acc
    grad: Tensor,  # [] acc: dL/dloss
    distance_weight: float,
    g_text: Tensor | None,  # [M, D] acc; overwritten
    g_image: Tensor | None,  # [N, D] acc; overwritten
    d_text: Tensor | None,  # [M, D] dtype
    d_image: Tensor | None,  # [N, D] dtype
    dot_text: Tensor | None,  # [M] acc
    dot_image: Tensor | None,  # [N] acc
) -> str:
    """Gradients of the inputs; a tower whose d is None is left out."""
    tensors = {"inv_text": inv_text, "inv_image": inv_image, "coef": coef, "stats": stats}
    tensors |= {"total": total, "grad": grad, "g_text": g_text, "g_image": g_image}
    tensors |= {"d_text": d_text, "d_image": d_image}
    tensors |= {"dot_text": dot_text, "dot_image": dot_image}
    return _run("normalize_backward", p, tensors, distance_weight=distance_weight)
