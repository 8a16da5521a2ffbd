"""contrastive_par in plain eager PyTorch, in the features' own dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pybackdoor.distributed import Ranks

_VALID, _SUSPECT = 1, 2


def contrastive_par(
    text: Tensor,  # [M, D]
    image: Tensor,  # [N, D]
    scale: Tensor,  # []
    owner: Tensor,  # [M] in [0, N), non-decreasing
    segment: Tensor,  # [N + 1]; follows from owner
    weight: Tensor,  # [M]
    column_weight: Tensor,  # [A], of the images of all ranks
    bits: Tensor,  # [A] uint8: 1 valid, 2 suspect
    text_ref: Tensor | None,  # [M, D]
    image_ref: Tensor | None,  # [N, D]
    normalize: bool,
    counts: list[int],
    distance_weight: float,
    tau: float,
) -> Tensor:
    """`pybackdoor.ops.contrastive_par` by autograd; arguments are taken as valid.

    Targets are separate from the sums over negatives: -log p = softplus(-z), -log(1 - p) =
    softplus(z), z = S* - log sum exp of the negatives. With counts every rank gathers everything,
    its own rows alone carrying gradients, and forms the whole loss.

    Returns:
        [6]: loss, contrastive, s_image, s_text, gate_image, gate_text; fp32, fp64 for fp64.
    """
    if counts:
        ranks = Ranks()
        rows = [int(n) for (n,) in ranks.agree([len(text)], text.device)]
        owner = ranks.gather(owner + sum(counts[: ranks.rank]), rows)
        text, weight = ranks.gather(text, rows), ranks.gather(weight, rows)
        text_ref = None if text_ref is None else ranks.gather(text_ref, rows)
        image = ranks.gather(image, counts)
        image_ref = None if image_ref is None else ranks.gather(image_ref, counts)
        scale = ranks.share(scale)
    owner, dtype = owner.long(), text.dtype
    scale, weight, column_weight = (
        x.to(text.device, dtype) for x in (scale, weight, column_weight)
    )
    valid, suspect = (bits & _VALID) != 0, (bits & _SUSPECT) != 0
    if normalize:
        text, image = F.normalize(text, dim=-1), F.normalize(image, dim=-1)
    logits = scale * text @ image.T  # [M, A]
    target = owner[:, None] == torch.arange(len(image), device=text.device)
    up, down = weight[:, None] > 0, weight[:, None] < 0
    negative = ~target & valid & (up | (down & ~suspect))

    rows_have, z_negative = _log_sum_exp(logits, negative, 1)
    z = logits.gather(1, owner[:, None])[:, 0] - z_negative if len(image) else weight
    sign = torch.where(weight < 0, -1, 1).to(dtype)
    by_row = torch.where(rows_have, weight.abs() * -F.logsigmoid(sign * z), 0)

    columns_have, y_negative = _log_sum_exp(logits, negative & up, 0)
    positive, y_positive = _log_sum_exp(logits, target & up, 0)
    by_column = column_weight * -F.logsigmoid(y_positive - y_negative)
    by_column = torch.where(columns_have & positive & (column_weight != 0), by_column, 0)
    contrastive = by_row.sum() + by_column.sum()

    loss, distances, gates = contrastive, [], []
    for x, ref, part in ((image, image_ref, valid), (text, text_ref, valid[owner])):
        s = torch.zeros_like(loss)
        if ref is not None:
            squares = torch.where(part, (x - ref).square().sum(-1), 0)
            s = squares.sum() / part.sum().clamp_min(1)
        loss = loss - torch.where(s > tau, 0, distance_weight * s)
        distances.append(s)
        gates.append((s <= tau).to(dtype))
    stats = torch.stack((loss, contrastive, *distances, *gates))
    return stats.to(torch.promote_types(dtype, torch.float32))


def _log_sum_exp(
    logits: Tensor,  # [M, A]
    part: Tensor,  # [M, A] bool
    dim: int,
) -> tuple[Tensor, Tensor]:
    """Which lines have any part, and log sum exp over it (0 where they have none)."""
    has = part.any(dim)
    kept = logits.masked_fill(~part & has.unsqueeze(dim), -torch.inf)
    return has, torch.where(has, kept.logsumexp(dim), 0) if kept.shape[dim] else has.to(logits)
