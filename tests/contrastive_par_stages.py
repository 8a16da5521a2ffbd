"""The stages of contrastive_par in plain torch: what every backend's stages must compute.

Each function writes into the tensors it is given, as the native and the Triton stages do.

M text rows, N images of this rank, A images of all ranks (A = N in one process), of which this
rank's are [offset, offset + N); D features. "acc" is fp64 for fp64 inputs, else fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pybackdoor.ops._contrastive_par_problem import SUSPECT, VALID, Problem

EPS = 1e-12  # smallest norm that a row is divided by
LOG_TINY = -70.0  # sums below e^-70 are formed again, with a shift of their own


def shift(p: Problem) -> Tensor:
    """m = max(0, s - 75): exp(S - m) of unit rows neither overflows nor all underflow."""
    return (p.scale - 75).clamp_min(0)


def masked(p: Problem, first: int, rows: int) -> Tensor:
    """[rows, A] bool: the pairs that are no negatives of text rows first .. first + rows - 1."""
    weight, owner = p.weight[first : first + rows, None], p.owner[first : first + rows, None]
    columns = torch.arange(len(p.bits), device=owner.device)[None]
    off = (p.bits & VALID) == 0
    suspect = (p.bits & SUSPECT) != 0
    target = columns == owner + p.offset
    return target | off[None] | (weight == 0) | ((weight < 0) & suspect[None])


def prep(p, that, ihat, inv_text, inv_image, target, dist_text, dist_image, flagged) -> None:
    """Unit rows in the matrix dtype, 1/norms, target scores S*, squared distances; clears flagged.

    that [M, D], ihat [N, D]: matrix dtype. inv_text [M], inv_image [N], target [M], dist_text [M],
    dist_image [N]: acc. flagged [2] int32. Without normalize the rows are taken as they are and
    the inverse norms are 1. Distances are 0 without a reference, and where the row takes no part:
    text rows whose owner is not valid, images that are not valid.
    """
    acc = target.dtype
    valid = (p.bits[p.offset : p.offset + len(p.image)] & VALID) != 0
    units = []
    for x, ref, hat, inv, dist, part in (
        (p.text, p.text_ref, that, inv_text, dist_text, valid[p.owner.long()]),
        (p.image, p.image_ref, ihat, inv_image, dist_image, valid),
    ):
        x = x.to(acc)
        inv.copy_(1 / x.norm(dim=1).clamp_min(EPS) if p.normalize else torch.ones_like(inv))
        unit = x * inv[:, None]
        units.append(unit)
        hat.copy_(unit)
        dist.zero_()
        if ref is not None:
            dist.copy_(torch.where(part, (unit - ref.to(acc)).square().sum(1), 0))
    target.copy_(p.scale * (units[0] * units[1][p.owner.long()]).sum(1))
    flagged.zero_()


def exp_block(p, that, ihat, first, e, row_partial, col_partial) -> None:
    """E = exp(S - m) of text rows first .. first + B - 1, 0 where masked; and its partial sums.

    that [B, D] (the block's rows), ihat [A, D]: matrix dtype; e [B, A] matrix dtype.
    row_partial [Kr, M] acc: the columns first .. first + B - 1 are written, their sum over Kr is
    the row's sum. col_partial [Kc, A] acc: Kc slices of this block's rows, those with weight > 0.
    Sums are of fp32 values, before E is rounded to the matrix dtype.
    """
    s = p.scale * that.to(p.scale.dtype) @ ihat.to(p.scale.dtype).T
    value = (s - shift(p)).exp().masked_fill(masked(p, first, len(that)), 0)
    e.copy_(value)
    row_partial[:, first : first + len(that)] = 0
    row_partial[0, first : first + len(that)] = value.sum(1)
    col_partial.zero_()
    col_partial[0] = torch.where(p.weight[first : first + len(that), None] > 0, value, 0).sum(0)


def sums(p, row_partial, col_partial, target, r, c, log_p) -> None:
    """Sums of the partials in order, r [M] and c [A]; log_p [N] = log P of this rank's images.

    log P_j = log sum of exp(S*_i - m) over the rows of image j with weight > 0; -inf without any.
    """
    r.copy_(row_partial.sum(0))
    c.copy_(col_partial.sum(0))
    shifted = torch.where(p.weight > 0, target - shift(p), -torch.inf)
    for j in range(len(log_p)):
        a, b = int(p.segment[j]), int(p.segment[j + 1])
        log_p[j] = shifted[a:b].logsumexp(0) if b > a else -torch.inf


def needs_fixing(x: Tensor) -> Tensor:
    """Sums too small or too large to be trusted; NaN is left to propagate."""
    return (x < torch.tensor(LOG_TINY, dtype=x.dtype).exp()) | (x == torch.inf)


def lse(p, that, ihat, r, c, row_lse, col_lse) -> None:
    """log of the sums that need fixing, formed with an online maximum; 0 elsewhere.

    row_lse [M], col_lse [A]: acc, shifted by m like log r and log c; -inf where there is no
    negative at all. Rows with weight 0 and images with column weight 0 are left out (0).
    """
    s = p.scale * that.to(p.scale.dtype) @ ihat.to(p.scale.dtype).T - shift(p)
    s = s.masked_fill(masked(p, 0, len(that)), -torch.inf)
    row_lse.copy_(torch.where(needs_fixing(r) & (p.weight != 0), s.logsumexp(1), 0))
    columns = s.masked_fill(p.weight[:, None] <= 0, -torch.inf).logsumexp(0)
    col_lse.copy_(torch.where(needs_fixing(c) & (p.column_weight != 0), columns, 0))


def finalise(
    p, target, r, c, log_p, row_lse, col_lse,
    alpha, beta, coef, row_fix, col_fix, loss_row, loss_col, flagged,
) -> None:  # fmt: skip
    """Loss parts and the factors of dS, which is E (alpha_i + beta_j) off the targets.

    log_p [A]: of all images. alpha [M], beta [A]: 0 for lines that need fixing; there row_fix [M],
    col_fix [A] hold -gamma_i, -eta_j for dS_ij = fix * exp(S_ij - m - lse), 0 elsewhere. beta_j
    is meant for rows with weight > 0 only. coef [M]: dL/dS*. loss_row [M]; loss_col [N] of this
    rank's images. flagged [2] int32 += the fixed rows, and the fixed columns.
    A row without negatives, or a column without negatives or positives, contributes 0.
    """
    m = shift(p)
    fix = needs_fixing(r) & (p.weight != 0)
    log_r = torch.where(fix, row_lse, r.log())
    none = (log_r == -torch.inf) | (p.weight == 0)
    z = torch.where(none, 0, target - m - log_r)
    sign = torch.where(p.weight > 0, 1.0, -1.0).to(z.dtype)
    magnitude = torch.where(none, 0, p.weight.abs())
    loss_row.copy_(-magnitude * F.logsigmoid(sign * z))
    gamma = -magnitude * sign * torch.sigmoid(-sign * z)
    alpha.copy_(torch.where(none | fix, 0, -gamma / r))
    row_fix.copy_(torch.where(fix & ~none, -gamma, 0))

    fix_c = needs_fixing(c) & (p.column_weight != 0)
    log_c = torch.where(fix_c, col_lse, c.log())
    off = (log_c == -torch.inf) | (log_p == -torch.inf) | (p.column_weight == 0)
    y = torch.where(off, 0, log_p - log_c)
    v = torch.where(off, 0, p.column_weight)
    eta = -v * torch.sigmoid(-y)
    beta.copy_(torch.where(off | fix_c, 0, -eta / c))
    col_fix.copy_(torch.where(fix_c & ~off, -eta, 0))
    own = slice(p.offset, p.offset + len(loss_col))
    loss_col.copy_((-v * F.logsigmoid(y))[own])
    owner = p.owner.long() + p.offset
    share = torch.where(
        (p.weight > 0) & ~off[owner], eta[owner] * (target - m - log_p[owner]).exp(), 0
    )
    coef.copy_(gamma + share)
    flagged[0] += int((fix & ~none).sum())
    flagged[1] += int((fix_c & ~off).sum())


def totals(p, loss_row, loss_col, dist_text, dist_image, out) -> None:
    """out [5] acc: contrastive loss, sum of dist_text, its count, sum of dist_image, its count.

    Counts are of the rows that take part: valid images, and text rows whose owner is valid.
    """
    valid = (p.bits[p.offset : p.offset + len(p.image)] & VALID) != 0
    out[0] = loss_row.sum() + loss_col.sum()
    out[1], out[2] = dist_text.sum(), valid[p.owner.long()].sum()
    out[3], out[4] = dist_image.sum(), valid.sum()


def close(total, distance_weight, tau, stats) -> None:
    """stats [6] acc: loss, contrastive, s_image, s_text, gate_image, gate_text.

    S = sum / max(count, 1); gate = 1[S <= tau], a NaN closes it;
    loss = contrastive - distance_weight (gate_image S_image + gate_text S_text), where a closed
    gate adds exactly 0 but a NaN distance makes the loss NaN.
    """
    s_text, s_image = total[1] / total[2].clamp_min(1), total[3] / total[4].clamp_min(1)
    loss = total[0].clone()
    for s, k in ((s_image, 4), (s_text, 5)):
        stats[k] = (s <= tau).to(stats.dtype)
        loss -= torch.where(s > tau, 0, distance_weight * s)
    stats[:4] = torch.stack((loss, total[0], s_image, s_text))


def gradients(p, that, ihat, alpha, beta, g_text, g_image) -> None:
    """g_text [M, D] = dS Ihat and g_image [A, D] = dS^T That, dS = E (alpha + [w > 0] beta).

    Either may be None. A factor of exactly 0 gives 0 even where E is infinite.
    """
    s = p.scale * that.to(p.scale.dtype) @ ihat.to(p.scale.dtype).T
    e = (s - shift(p)).exp().masked_fill(masked(p, 0, len(that)), 0)
    factor = alpha[:, None] + torch.where(p.weight[:, None] > 0, beta[None], 0)
    ds = torch.where(factor == 0, 0, e * factor)
    if g_text is not None:
        g_text.copy_(ds @ ihat.to(ds.dtype))
    if g_image is not None:
        g_image.copy_(ds.T @ that.to(ds.dtype))


def fixup(p, that, ihat, row_fix, col_fix, row_lse, col_lse, flagged, g_text, g_image) -> None:
    """Adds the dS of fixed lines to the gradients' matrix part, in index order.

    dS_ij += row_fix_i exp(S_ij - m - row_lse_i) + [w_i > 0] col_fix_j exp(S_ij - m - col_lse_j),
    for pairs that are not masked. Nothing to do where flagged is 0.
    """
    s = p.scale * that.to(p.scale.dtype) @ ihat.to(p.scale.dtype).T - shift(p)
    off = masked(p, 0, len(that))
    rows = row_fix[:, None] * (s - row_lse[:, None]).exp()
    columns = col_fix[None] * (s - col_lse[None]).exp()
    ds = torch.where(row_fix[:, None] == 0, 0, rows)
    ds = ds + torch.where((col_fix[None] == 0) | (p.weight[:, None] <= 0), 0, columns)
    ds = ds.masked_fill(off, 0)
    if g_text is not None:
        g_text += ds @ ihat.to(ds.dtype)
    if g_image is not None:
        g_image += ds.T @ that.to(ds.dtype)


def normalize_backward(
    p, inv_text, inv_image, coef, stats, total, grad, distance_weight,
    g_text, g_image, d_text, d_image, dot_text, dot_image,
) -> None:  # fmt: skip
    """Gradients of the inputs: target part, distance part, then through the normalisation.

    g_text [M, D], g_image [N, D] acc: the matrix part of this rank's rows, overwritten at will.
    grad [] acc: dL/dloss. stats, total: as above, of all ranks. d_text, d_image: input dtype.
        h_i = s (g_i + coef_i ihat_o(i)),  h_j = s (g_j + sum over its rows of coef_i that_i)
        dot = grad h . unit, so that the sum over one tower is dL/dlog s   (acc; [M] and [N])
        h -= 2 distance_weight gate / count (unit - ref)      where the row takes part
        d = grad (h - (h . unit) unit) inv; without normalize, or where the norm is at most EPS,
        d = grad h inv.
    Units are formed again from the inputs. A tower whose d is None is left out.
    """
    acc, count = p.scale.dtype, len(p.image)
    valid = (p.bits[p.offset : p.offset + count] & VALID) != 0
    owner = p.owner.long()
    text, image = p.text.to(acc) * inv_text[:, None], p.image.to(acc) * inv_image[:, None]
    towers = []
    if d_text is not None:
        h = p.scale * (g_text + coef[:, None] * image[owner])
        towers.append((h, text, p.text_ref, valid[owner], inv_text, stats[5], total[2],
                       d_text, dot_text))  # fmt: skip
    if d_image is not None:
        add = torch.zeros_like(image).index_add_(0, owner, coef[:, None] * text)
        towers.append((p.scale * (g_image + add), image, p.image_ref, valid, inv_image, stats[4],
                       total[4], d_image, dot_image))  # fmt: skip
    for h, unit, ref, part, inv, gate, rows, d, dot in towers:
        dot.copy_(grad * (h * unit).sum(1))
        if ref is not None:
            factor = -2 * distance_weight * gate / rows.clamp_min(1)
            h = h + torch.where(part[:, None], factor * (unit - ref.to(acc)), 0)
        if p.normalize:
            inside = (inv < 1 / EPS)[:, None]
            h = h - torch.where(inside, (h * unit).sum(1, keepdim=True) * unit, 0)
        d.copy_(grad * h * inv[:, None])
