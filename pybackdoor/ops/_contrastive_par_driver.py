"""contrastive_par's stages in order, forward and backward, on whatever backend has them.

`rows` are the stages bound by memory (native, or their Triton twins), `matrices` the products.
Nothing here waits for the device: what is kept, skipped or formed again follows from sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from pybackdoor._native import empty
from pybackdoor.distributed import Ranks
from pybackdoor.ops._contrastive_par_problem import Problem


class Backend(NamedTuple):
    rows: ModuleType
    matrices: ModuleType


class Distance(NamedTuple):
    """The distance term's weight (PAR's ½; negative: stay close) and its threshold."""

    weight: float
    tau: float


class Saved(NamedTuple):
    """What the backward pass needs."""

    that: Tensor  # [M, D] unit rows, matrix dtype
    ihat: Tensor  # [A, D]
    e: Tensor  # [M, A or more] matrix dtype, or [0]: formed again
    lines: Tensor  # acc: the vectors of `LINES`, one after the other
    total: Tensor  # [5] acc, of all ranks
    flagged: Tensor  # [2] int32


LINES = ("inv_text", "inv_image", "alpha", "beta", "coef")
LINES += ("row_fix", "col_fix", "row_lse", "col_lse")
_SCRATCH = ("target", "dist_text", "dist_image", "r", "c", "loss_row", "loss_col")
_OF_TEXT = {"inv_text", "alpha", "coef", "row_fix", "row_lse"}
_OF_TEXT |= {"target", "dist_text", "r", "loss_row"}
_OF_ALL = {"beta", "col_fix", "col_lse", "c"}


def line_sizes(names: tuple[str, ...], m: int, n: int, a: int) -> list[int]:
    """Elements of each vector, rounded up so that each starts at a multiple of 16 bytes."""
    sizes = [m if name in _OF_TEXT else a if name in _OF_ALL else n for name in names]
    return [(size + 3) // 4 * 4 for size in sizes]


def _lines(names: tuple[str, ...], flat: Tensor, p: Problem) -> dict[str, Tensor]:
    m, n, a = len(p.text), len(p.image), len(p.bits)
    parts = flat.split(line_sizes(names, m, n, a))
    wanted = {name: m if name in _OF_TEXT else a if name in _OF_ALL else n for name in names}
    return {name: part[: wanted[name]] for name, part in zip(names, parts, strict=True)}


def new_lines(names: tuple[str, ...], p: Problem) -> Tensor:
    size = sum(line_sizes(names, len(p.text), len(p.image), len(p.bits)))
    return p.scale.new_zeros(size)  # the gaps between them too


def shape_of_e(matrices: ModuleType, m: int, a: int, dtype: torch.dtype, budget: int) -> list[int]:
    """Of the memory for E [m, a]: [0] where it is not kept, which its size alone decides."""
    columns = matrices.e_columns(a)
    most = matrices.BUDGET if budget < 0 else budget
    return [m, columns] if 0 < m * columns * dtype.itemsize <= most else [0]


def forward(
    p: Problem,
    distance: Distance,
    backend: Backend,
    counts: list[int],  # images of each rank; empty for one process
    precision: str,
    budget: int,  # bytes of E that may be kept; -1: the backend's own
    may_drop: bool,  # form E again where there is no memory to keep it
) -> tuple[Tensor, Saved]:
    """The six statistics (see stage `close`) and what the backward pass needs."""
    rows, matrices = backend
    ranks = Ranks() if counts else None
    m, n, a = len(p.text), len(p.image), len(p.bits)
    dtype = matrices.matrix_dtype(p.scale.dtype, precision)
    that, ihat = (x.new_empty(x.shape, dtype=dtype) for x in (p.text, p.image))
    flat = new_lines(LINES, p)
    line = _lines(LINES, flat, p)
    line |= _lines(_SCRATCH, new_lines(_SCRATCH, p), p)
    flagged = torch.empty(2, dtype=torch.int32, device=p.text.device)
    log_p = p.scale.new_empty(n)
    total, stats = p.scale.new_empty(5), p.scale.new_empty(6)

    rows.prep(
        p, that, ihat, line["inv_text"], line["inv_image"], line["target"],
        line["dist_text"], line["dist_image"], flagged,
    )  # fmt: skip
    if ranks:
        ihat = ranks.gather(ihat, counts)
    shape = shape_of_e(matrices, m, a, dtype, budget)
    e = _allocate_e(shape, dtype, p, may_drop) if len(shape) == 2 else None
    row_partial, col_partial = matrices.exponentials(p, that, ihat, e, precision)
    rows.sums(p, row_partial, col_partial, line["target"], line["r"], line["c"], log_p)
    if ranks:
        ranks.sum_(line["c"])
        log_p = ranks.gather(log_p, counts)
    lse = line["row_lse"], line["col_lse"]
    rows.lse(p, that, ihat, line["r"], line["c"], *lse)
    if ranks:  # a column's part on every rank; only those that need it are not 0
        parts = ranks.gather(lse[1][None], [1] * ranks.size)
        lse[1].copy_(torch.where((parts != 0).any(0), parts.logsumexp(0), 0))
    rows.finalise(
        p, line["target"], line["r"], line["c"], log_p, *lse, line["alpha"], line["beta"],
        line["coef"], line["row_fix"], line["col_fix"], line["loss_row"], line["loss_col"], flagged,
    )  # fmt: skip
    rows.totals(p, line["loss_row"], line["loss_col"], line["dist_text"], line["dist_image"], total)
    if ranks:
        ranks.sum_(total)
    rows.close(total, distance.weight, distance.tau, stats)
    return stats, Saved(that, ihat, that.new_empty(0) if e is None else e, flat, total, flagged)


def backward(
    p: Problem,
    distance: Distance,
    backend: Backend,
    counts: list[int],
    precision: str,
    saved: Saved,
    stats: Tensor,  # [6] acc
    grad: Tensor,  # [] acc: dL/dloss
    needs: tuple[bool, bool, bool],  # text, image, scale
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of text, image and scale; a tower without need of one is left out."""
    rows, matrices = backend
    ranks = Ranks() if counts else None
    need_text, need_image, need_scale = needs
    # The ranks' shares of scale's gradient must be of one tower to add up.
    need_text = need_text or (need_scale and (ranks is not None or not need_image))
    line = _lines(LINES, saved.lines, p)
    g_text = p.scale.new_empty(p.text.shape) if need_text else None
    g_image = p.scale.new_empty(saved.ihat.shape) if need_image or ranks else None
    e = saved.e if saved.e.ndim == 2 else None
    matrices.gradients(
        p, saved.that, saved.ihat, e, line["alpha"], line["beta"], g_text, g_image, precision
    )
    rows.fixup(
        p, saved.that, saved.ihat, line["row_fix"], line["col_fix"], line["row_lse"],
        line["col_lse"], saved.flagged, g_text, g_image,
    )  # fmt: skip
    if ranks:  # every rank, whatever it needs itself
        g_image = ranks.sum_scatter(g_image, counts)
    d_text = torch.empty_like(p.text) if need_text else None
    d_image = torch.empty_like(p.image) if need_image else None
    dot_text, dot_image = p.scale.new_empty(len(p.text)), p.scale.new_empty(len(p.image))
    rows.normalize_backward(
        p, line["inv_text"], line["inv_image"], line["coef"], stats, saved.total, grad,
        distance.weight, g_text, g_image, d_text, d_image, dot_text, dot_image,
    )  # fmt: skip
    d_scale = None
    if need_scale:
        d_scale = (dot_text if need_text else dot_image).sum() / p.scale
    return d_text if needs[0] else None, d_image, d_scale


def _allocate_e(shape: list[int], dtype: torch.dtype, p: Problem, may_drop: bool) -> Tensor | None:
    """Memory for E; None where there is none left, so that E is formed again in the backward."""
    try:
        return empty(shape, dtype, p.text.device)
    except (MemoryError, RuntimeError) as error:
        if not (may_drop and _lacks_memory(error)):
            raise
        return None


def _lacks_memory(error: Exception) -> bool:
    out = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return out or "allocate memory" in str(error)  # what torch's CPU allocator says


@contextmanager
def plain_memory_errors(p: Problem) -> Iterator[None]:
    """Names the op and its sizes where even a block of E does not fit."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _lacks_memory(error):
            raise
        raise torch.OutOfMemoryError(
            f"contrastive_par: no memory for {len(p.text)} x {len(p.bits)} pairs of "
            f"{p.text.shape[1]} features, E formed block by block or budget bytes of it kept "
            f"({error})"
        ) from error
