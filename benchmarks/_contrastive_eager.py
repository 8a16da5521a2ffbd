"""CLIP's loss as users write it, in several ways; and in fp64 by blocks, for the errors.

All take raw features (text [N, D], image [N, D]) and exp(logit_scale) and normalise them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from _ceilings import onednn_linear
from torch import Tensor

# Elements of the fp64 logits that exist at a time; on a CPU, few enough for malloc to keep them.
BLOCK = {"cpu": 1 << 21, "cuda": 1 << 26}
SAMPLE = 512  # rows of each feature gradient that are compared where N is larger than FULL
FULL = 4096


class OneDnnProduct(torch.autograd.Function):
    """x @ y.T with every product through oneDNN (fp32, CPU)."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return onednn_linear(x, y)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return onednn_linear(g, y.T.contiguous()), onednn_linear(g.T.contiguous(), x.T.contiguous())


def plain_product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y.T."""
    return x @ y.T


def distance_term(unit: Tensor, ref: Tensor, weight: float, tau: float) -> Tensor:
    """-weight * mean squared distance of unit rows [N, D] to ref [N, D]; 0 beyond tau."""
    distance = (unit.float() - ref.float()).square().sum(-1).mean()
    return -weight * torch.where(distance <= tau, distance, torch.zeros_like(distance))


def two_products(text: Tensor, image: Tensor, scale: Tensor, product=plain_product) -> Tensor:
    """Two products and two cross entropies, as open_clip's ClipLoss has them, of unit rows."""
    labels = torch.arange(len(text), device=text.device)
    per_image, per_text = product(scale * image, text), product(scale * text, image)
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def one_product(text: Tensor, image: Tensor, scale: Tensor, product=plain_product) -> Tensor:
    """One product; the second cross entropy takes its transpose."""
    labels = torch.arange(len(text), device=text.device)
    logits = product(scale * image, text)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


class Exact(NamedTuple):
    """The fp64 answer at given inputs."""

    loss: Tensor  # []
    log_scale: Tensor  # [] dL/dlog(scale)
    rows: Tensor  # [K] indices of the feature rows that the gradients are of
    text: Tensor  # [K, D] dL/dtext, of the raw features
    image: Tensor  # [K, D]

    def errors(self, loss: Tensor, grads: tuple[Tensor | None, ...]) -> dict[str, float]:
        """Normwise relative errors of a loss and of (text, image, log_scale) gradients, if any."""
        want = {"text": self.text, "image": self.image, "log_scale": self.log_scale}
        found = {"loss": _relative(loss, self.loss)}
        for (name, exact), got in zip(want.items(), grads, strict=True):
            if got is not None:
                found[name] = _relative(got if name == "log_scale" else got[self.rows], exact)
        return found


def _relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def exact(
    text: Tensor,
    image: Tensor,
    scale: Tensor,
    refs: tuple[Tensor, Tensor] | None = None,
    weight: float = 0.5,
    tau: float = 2.15,
) -> Exact:
    """CLIP's loss and gradients in fp64, without the N x N logits at once.

    L = 1/2N sum_i [log r_i - S_ii] + [log c_i - S_ii], r and c the row and column sums of exp(S),
    and with refs the distance term of each tower. One pass forms the sums, and with them
    dL/dlog(scale) = sum dS S; a second the gradients.
    """
    text, image, s = text.detach().double(), image.detach().double(), scale.detach().double()
    that, ihat = F.normalize(text, dim=1), F.normalize(image, dim=1)
    n = len(that)
    height = max(1, BLOCK[that.device.type] // n)
    r, r_s, c, c_s = (torch.zeros(n, dtype=torch.float64, device=that.device) for _ in range(4))
    for first in range(0, n, height):
        block = slice(first, first + height)
        logits = s * that[block] @ ihat.T
        e = (logits - s).exp()
        r[block], c = e.sum(1), c + e.sum(0)
        e *= logits
        r_s[block], c_s = e.sum(1), c_s + e.sum(0)
    target = s * (that * ihat).sum(1)
    loss = (r.log() + c.log() + 2 * s - 2 * target).sum() / (2 * n)
    log_scale = (r_s / r + c_s / c - 2 * target).sum() / (2 * n)
    rows = torch.arange(n, device=that.device)
    if n > FULL:
        rows = rows[:: n // SAMPLE]

    def gradient(raw, own, other, sums, other_sums, ref) -> Tensor:
        parts = []
        for chunk in rows.split(height):
            e = (s * own[chunk] @ other.T - s).exp()
            ds = e * (1 / sums[chunk, None] + 1 / other_sums)
            g = s * (ds @ other - 2 * other[chunk]) / (2 * n)
            unit = own[chunk]
            if ref is not None:
                g -= 2 * weight / n * (unit - ref[chunk])
            g = g - (g * unit).sum(1, keepdim=True) * unit
            parts.append(g / raw[chunk].norm(dim=1, keepdim=True))
        return torch.cat(parts)

    open_refs: list[Tensor | None] = [None, None]
    for k, (own, ref) in enumerate(zip((that, ihat), refs or (), strict=False)):
        distance = (own - ref.double()).square().sum(1).mean()
        if distance <= tau:
            loss = loss - weight * distance
            open_refs[k] = ref.double()
    return Exact(
        loss,
        log_scale,
        rows,
        gradient(text, that, ihat, r, c, open_refs[0]),
        gradient(image, ihat, that, c, r, open_refs[1]),
    )
