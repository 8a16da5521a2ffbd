"""contrastive_par: the contrastive loss with signed text rows, and PAR's distance term.

Forward and backward without an M x N matrix in fp32 on a GPU, and beyond a budget without any; the
temperature's gradient comes with the features'. See `contrastive_par` for the definitions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pybackdoor import _backend, reference
from pybackdoor.distributed import Ranks
from pybackdoor.ops import _contrastive_par_driver as driver
from pybackdoor.ops._contrastive_par_check import (
    OP,
    check_counts,
    check_features,
    check_options,
    owners,
    plain,
    segments,
    weights,
)
from pybackdoor.ops._contrastive_par_problem import Problem

__all__ = ["ContrastivePar", "contrastive_par"]


class ContrastivePar(NamedTuple):
    """The loss and what it is made of; all [] in fp32 (fp64 for fp64 features).

    Attributes:
        loss: contrastive - distance_weight (gate_image s_image + gate_text s_text); the only one
            with a gradient.
        contrastive: the weighted sum over text rows and images.
        s_image, s_text: mean squared distances to the reference; 0 without one.
        gate_image, gate_text: 1 where s <= tau, else 0.
    """

    loss: Tensor
    contrastive: Tensor
    s_image: Tensor
    s_text: Tensor
    gate_image: Tensor
    gate_text: Tensor


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _precision(precision: str, dtype: torch.dtype) -> str:
    """ "auto" loses nothing that the features hold: TF32 has fp16's ten bits of mantissa."""
    if precision != "auto":
        return precision
    if dtype == torch.bfloat16:
        return "bf16"
    return "tf32" if dtype == torch.float16 else "tf32x3"


@torch.compiler.assume_constant_result
def _backend_name(device: torch.device, dtype: torch.dtype) -> str:
    """Where the op runs; fp64, an oracle's dtype, has no GPU kernel."""
    if device.type == "cuda" and dtype == torch.float64:
        return "reference"
    return _backend.choose(device, OP).name


def _backend_of(device: torch.device) -> driver.Backend:
    """The modules of a backend; imported when first used, since one of them imports Triton."""
    name = _backend.choose(device, OP).name
    if name == "cpu":
        from pybackdoor.ops import _contrastive_par_cpu as matrices
        from pybackdoor.ops import _contrastive_par_native as rows
    else:
        from pybackdoor.ops import _contrastive_par_gpu as matrices

        if name == "cuda":
            from pybackdoor.ops import _contrastive_par_native as rows
        else:
            from pybackdoor.ops import _contrastive_par_triton as rows
    return driver.Backend(rows, matrices)


def _problem(
    text: Tensor,
    image: Tensor,
    scale: Tensor,
    owner: Tensor,
    segment: Tensor,
    weight: Tensor,
    column_weight: Tensor,
    bits: Tensor,
    text_ref: Tensor | None,
    image_ref: Tensor | None,
    normalize: bool,
    counts: list[int],
) -> Problem:
    offset = sum(counts[: Ranks().rank]) if counts else 0
    return Problem(
        text.contiguous(),
        image.contiguous(),
        None if text_ref is None else text_ref.contiguous(),
        None if image_ref is None else image_ref.contiguous(),
        owner,
        segment,
        weight,
        column_weight,
        bits,
        scale.to(text.device, _accumulator(text.dtype)).reshape(()),
        normalize,
        offset,
    )


@torch.library.custom_op("pybackdoor::contrastive_par_fwd", mutates_args=())
def contrastive_par_fwd(
    text: Tensor,
    image: Tensor,
    scale: Tensor,
    owner: Tensor,
    segment: Tensor,
    weight: Tensor,
    column_weight: Tensor,
    bits: Tensor,
    text_ref: Tensor | None,
    image_ref: Tensor | None,
    normalize: bool,
    counts: list[int],
    distance: list[float],
    precision: str,
    budget: int,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The registered op behind `contrastive_par`: statistics, and what the backward pass needs.

    column_weight and bits are those of the images of all ranks; distance is the term's weight and
    threshold; budget the bytes of E to be kept at most, -1 for the backend's own. Compiled code
    relies on the sizes it was promised: there E is not given up where its memory lacks.
    """
    p = _problem(
        *(text, image, scale, owner, segment, weight, column_weight, bits, text_ref, image_ref),
        *(normalize, counts),
    )
    with _backend.running_on(text.device), driver.plain_memory_errors(p):
        stats, saved = driver.forward(
            p, driver.Distance(*distance), _backend_of(text.device), counts, precision, budget,
            may_drop=not compiled,
        )  # fmt: skip
    return stats, *saved


@contrastive_par_fwd.register_fake
def _(
    text, image, scale, owner, segment, weight, column_weight, bits, text_ref, image_ref,
    normalize, counts, distance, precision, budget, compiled,
):  # fmt: skip
    backend = _backend_of(text.device)
    m, n, a = text.shape[0], image.shape[0], bits.shape[0]
    acc = _accumulator(text.dtype)
    dtype = backend.matrices.matrix_dtype(acc, precision)
    shape = driver.shape_of_e(backend.matrices, m, a, dtype, budget)
    lines = sum(driver.line_sizes(driver.LINES, m, n, a))
    return (
        text.new_empty(6, dtype=acc),
        text.new_empty(m, text.shape[1], dtype=dtype),
        text.new_empty(a, text.shape[1], dtype=dtype),
        text.new_empty(shape, dtype=dtype),
        text.new_empty(lines, dtype=acc),
        text.new_empty(5, dtype=acc),
        text.new_empty(2, dtype=torch.int32),
    )


@torch.library.custom_op("pybackdoor::contrastive_par_bwd", mutates_args=())
def contrastive_par_bwd(
    grad: Tensor,  # [6] acc: that of the statistics; only the loss has one
    text: Tensor,
    image: Tensor,
    scale: Tensor,
    owner: Tensor,
    segment: Tensor,
    weight: Tensor,
    column_weight: Tensor,
    bits: Tensor,
    text_ref: Tensor | None,
    image_ref: Tensor | None,
    normalize: bool,
    counts: list[int],
    distance: list[float],
    precision: str,
    saved: list[Tensor],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of text, image and scale; [0] where none is needed."""
    p = _problem(
        *(text, image, scale, owner, segment, weight, column_weight, bits, text_ref, image_ref),
        *(normalize, counts),
    )
    stats, *kept = saved
    with _backend.running_on(text.device), driver.plain_memory_errors(p):
        grads = driver.backward(
            p, driver.Distance(*distance), _backend_of(text.device), counts, precision,
            driver.Saved(*kept), stats, grad[0].contiguous(), tuple(needs),
        )  # fmt: skip
    d_text, d_image, d_scale = (text.new_empty(0) if g is None else g for g in grads)
    return d_text, d_image, d_scale.to(scale).reshape(scale.shape) if needs[2] else d_scale


@contrastive_par_bwd.register_fake
def _(
    grad, text, image, scale, owner, segment, weight, column_weight, bits, text_ref, image_ref,
    normalize, counts, distance, precision, saved, needs,
):  # fmt: skip
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else text.new_empty(0)
        for x, need in zip((text, image, scale), needs, strict=True)
    )


def _save(ctx, inputs, output) -> None:
    *tensors, normalize, counts, distance, precision, _, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.options = (normalize, counts, distance, precision)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    needs = list(ctx.needs_input_grad[:3])
    nothing = (None,) * 13
    if grad is None:
        return (None,) * 3 + nothing
    tensors, saved = ctx.saved_tensors[:10], ctx.saved_tensors[10:]
    grads = contrastive_par_bwd(grad, *tensors, *ctx.options, list(saved), needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *nothing


contrastive_par_fwd.register_autograd(_backward, setup_context=_save)


def _no_second(ctx, *_):
    raise RuntimeError(f"{OP}: has no second derivative; use pybackdoor.reference.{OP} for one")


contrastive_par_bwd.register_autograd(_no_second)


def contrastive_par(
    text: Tensor,
    image: Tensor,
    scale: Tensor,
    *,
    owner: Tensor | None = None,
    weight: Tensor | None = None,
    column_weight: Tensor | None = None,
    valid: Tensor | None = None,
    suspect: Tensor | None = None,
    text_ref: Tensor | None = None,
    image_ref: Tensor | None = None,
    distance_weight: float = 0.5,
    tau: float = 2.15,
    normalize: bool = True,
    precision: str = "auto",
    budget: int | None = None,
    counts: Sequence[int] | None = None,
) -> ContrastivePar:
    """Contrastive loss of text rows against images, with unlearning and PAR's distance term.

    Each text row i (a caption, or one of its tokens) has an owner image o(i) and a signed weight.
    With S = scale * cos, sums over the images j != o(i), and p_i = exp S_io / sum_j exp S_ij:

        w > 0, recover:  -w log p_i
        w < 0, unlearn:  -|w| log(1 - p_i), bounded below by 0, its gradient by |w|
        w = 0:           the row is skipped, and is no negative for any image

    plus column_weight * (-log q_j), where q_j is image j's probability among the rows with w > 0,
    minus distance_weight * [S <= tau] S for each tower with a reference, S the mean of
    ||unit - ref||^2, its gate decided on the device (PAR; a negative weight with tau = inf: stay
    close). The defaults are CLIP's symmetric loss: owner i for row i, all weights 1 / (2 N).

    Rows without a negative, and images without a negative or a positive, contribute 0; NaN
    features give a NaN loss. The number of threads changes no bit, but for what it changes in
    torch's own matrix products: with AVX2 in torch 2.10 their rounding.

    Args:
        text: [M, D] fp32, bf16, fp16 or fp64 (fp64: on a GPU by the reference).
        image: [N, D], same dtype and device.
        scale: [] exp(logit_scale), dimensionless, > 0; receives a gradient. On the CPU beside CUDA
            features it is copied, and its gradient back, which waits for the device.
        owner: [M] int32 or int64 in [0, N); None: M = N and row i is image i's caption. Rows in
            another than ascending order are sorted first, which copies text. Range is checked on
            the CPU only: a CUDA owner out of it leaves its row out of the contrastive part.
        weight: [M] floating; None: 1 / (2 N). Finite; checked on the CPU only, as the next.
        column_weight: [N] floating, >= 0; None: 1 / (2 N) without owner and weight, else 0.
        valid: [N] bool; False leaves an image and its rows out altogether.
        suspect: [N] bool; such images are no negatives for rows with w < 0.
        text_ref, image_ref: [M, D], [N, D] unit rows like text and image, constant; or None.
        distance_weight: of the distance term; PAR's is 0.5.
        tau: distance beyond which a tower's term is off; in [0, 4], or math.inf.
        normalize: False takes the features as they are, as open_clip's ClipLoss does.
        precision: of the matrix products on a GPU, with fp32 sums: "bf16", "tf32", "tf32x3"
            (three TF32 products: fp32's accuracy), "ieee"; "auto" is bf16 for bf16 features, tf32
            for fp16, tf32x3 for fp32. A CPU computes all in fp32. Autocast changes nothing here.
        budget: bytes of E = exp(S) kept for the backward pass; beyond it E is formed again in
            waves, as it is where its memory cannot be had (but for compiled code, which fails
            there: give it a budget that fits). None: 1 GiB on a GPU, 256 MiB on the CPU.
        counts: images of each rank when the ranks of a process group share one loss: text and
            image are then this rank's own (owner counts from 0 among them), the default weights
            are of the whole, the result is the whole loss on every rank, and the gradients'
            sum over ranks is its gradient. DistributedDataParallel averages: multiply the loss
            by the number of ranks there.
    Returns:
        ContrastivePar; all 0 for N = 0.
    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
        torch.OutOfMemoryError: even the waves' workspace does not fit.
    Example:
        >>> x = torch.eye(4)
        >>> contrastive_par(x, x, torch.tensor(10.0)).loss < 1e-3
        tensor(True)
    Source: arXiv 2412.00727 (distance term); the unlikelihood is bounded below where -w log p is
        not, and its gradient is the greatest where the row is still remembered.
    """
    check_features(text, image, scale, text_ref, image_ref)
    check_options(distance_weight, tau, precision, budget)
    counts = check_counts(counts, len(image))
    acc, total = _accumulator(text.dtype), sum(counts) if counts else len(image)
    if owner is weight is column_weight is valid is suspect is None and len(text) == len(image):
        owner, segment, w, v, bits = plain(len(image), total, acc, text.device)
    else:
        columns = owner is None and weight is None
        owner, order = owners(owner, text, image)
        if order is not None:
            text = text.index_select(0, order)
            text_ref = None if text_ref is None else text_ref.index_select(0, order)
            weight = None if weight is None else weight.to(order.device)[order]
        w, v, bits = weights(
            weight, column_weight, valid, suspect, owner, len(image), total, acc, columns
        )
        segment = segments(owner, len(image))
        owner = owner.clamp(0, max(0, len(image) - 1)).to(torch.int32)
    if counts:
        ranks = Ranks()
        v, bits = ranks.gather(v, counts), ranks.gather(bits, counts)
    fixed = (owner, segment, w, v, bits, text_ref, image_ref, normalize, counts)
    distance = [float(distance_weight), float(tau)]
    if _backend_name(text.device, text.dtype) == "reference":
        with _backend.running_on(text.device):
            stats = reference.contrastive_par(text, image, scale, *fixed, *distance)
    else:
        differentiable = any(x.requires_grad for x in (text, image, scale))
        if not (differentiable and torch.is_grad_enabled()):
            budget = 0
        stats = contrastive_par_fwd(
            text, image, scale, *fixed, distance, _precision(precision, text.dtype),
            -1 if budget is None else budget, torch.compiler.is_compiling(),
        )[0]  # fmt: skip
    loss, *rest = stats.unbind()
    return ContrastivePar(loss, *(x.detach() for x in rest))
