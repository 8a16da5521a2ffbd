"""The one rotation of both towers' embeddings that drift repair looks for.

It should bring a model's embeddings close to the reference's, and keep what the model says when
the reference's stored images or texts stand in for its own. The first alone is the orthogonal
Procrustes problem (Schönemann, Psychometrika 31, 1966). Where the towers have moved by more than a
rotation it is not enough: squared distances are ruled by what all images or all texts share, and a
small error there favours some texts over all others. So R should make small

    1/2 (S_image + S_text) + KL(p ‖ p_images) + 2 KL(p ‖ p_texts)

over the pairs' images x and texts t, with unit rows φ, ψ of the model, φ₀, ψ₀ of the reference and
the model's scale s:

    S_image, S_text = mean ‖φ(x)R − φ₀(x)‖², mean ‖ψ(t)R − ψ₀(t)‖²
    p               = softmax over t of s φ(x)·ψ(t), the model's own choice for each image
    p_images        = softmax over t of s φ₀(x)·ψ(t)R: stored images, new texts
    p_texts         = softmax over t of s φ(x)R·ψ₀(t): new images, stored texts
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Weights of the distances and of p_texts, from trials outside the benchmarks on cleanings of small
# models, clean and with the trigger checkerboard: what kept old images and old texts near the
# model's own accuracy on Caltech-101, and distances near the nearest rotation's on CIFAR-10.
CLOSE, TEXTS = 0.5, 2.0
# Of the search, from the same trials: fewer steps kept less, more steps or pairs a step no more.
STEPS, ROWS = 200, 512
_TURN = 0.25  # of a first step, times the root of D: Frobenius norm, in radians
_MOMENTUM, _SQUARES = 0.9, 0.99  # Adam's, the second of all entries together


class Rows(NamedTuple):
    """Unit embeddings of the same n pairs by one model."""

    image: Tensor  # [n, D]
    text: Tensor  # [n, D]

    def take(self, rows: Tensor) -> Rows:  # [m] indices
        return Rows(self.image[rows], self.text[rows])

    def turned(self, rotation: Tensor) -> Rows:  # [D, D]
        return Rows(self.image @ rotation, self.text @ rotation)


class Fit(NamedTuple):
    """How a reference's stored embeddings fit a model's.

    Attributes:
        image, text: S_image and S_text, in [0, 4].
        old_images, old_texts: KL(p ‖ p_images) and KL(p ‖ p_texts), means over images in nats.
    """

    image: float
    text: float
    old_images: float
    old_texts: float

    @staticmethod
    def of(rows: Rows, old: Rows, scale: float) -> Fit:
        """Means over pairs; an image's texts are those of up to ROWS pairs, its own among them."""
        sums = torch.zeros(4, dtype=torch.float64, device="cpu")
        for new, there in _blocks(rows, old):
            apart = [(a - b).square().sum() for a, b in zip(new, there, strict=True)]
            own, *stored = (logits.log_softmax(1) for logits in _logits(new, there, scale))
            lost = [(own.exp() * (own - other)).sum() for other in stored]
            sums += torch.stack([*apart, *lost]).double().cpu()
        return Fit(*(sums / len(rows.image)).tolist())

    @property
    def objective(self) -> float:
        return CLOSE * (self.image + self.text) + self.old_images + TEXTS * self.old_texts


def _blocks(rows: Rows, old: Rows) -> Iterator[tuple[Rows, Rows]]:
    """Pairs in nearly equal blocks of at most ROWS, so that logits take bounded memory."""
    n = -(-len(rows.image) // ROWS)
    parts = [zip(*(x.tensor_split(n) for x in each), strict=True) for each in (rows, old)]
    for new, there in zip(*parts, strict=True):
        yield Rows(*new), Rows(*there)


def slope(rows: Rows, old: Rows, scale: float) -> Tensor:
    """[D, D] skew A: turned by exp(B), B skew and small, the objective changes by tr(AᵀB)."""
    own, images, texts = (logits.softmax(1) for logits in _logits(rows, old, scale))
    by_images, by_texts = images - own, TEXTS * (texts - own)  # [n, n]
    kept = rows.text.T @ (by_images.T @ old.image) + rows.image.T @ (by_texts @ old.text)
    close = rows.image.T @ old.image + rows.text.T @ old.text
    full = (scale * kept - 2 * CLOSE * close) / len(rows.image)
    return (full - full.T) / 2


def _logits(rows: Rows, old: Rows, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of p, p_images and p_texts, each [n, n]: images x texts."""
    pairs = ((rows.image, rows.text), (old.image, rows.text), (rows.image, old.text))
    first, second, third = (scale * image @ text.T for image, text in pairs)
    return first, second, third


def kept_rotation(
    rows: Rows,
    old: Rows,
    scale: float,
    start: Tensor,  # [D, D] orthogonal
) -> Tensor:
    """[D, D] orthogonal, fp64 on the CPU: a local minimum of the objective near ``start``.

    Adam on the rotations: the momentum is of angles, the step's length falls linearly to nothing,
    each step sees ROWS pairs. Rows are worked on in their dtype and on their device. A reflection
    stays one.
    """
    dim, n = start.shape[0], len(rows.image)
    rotation = start.to(rows.image)
    angles, square = torch.zeros_like(rotation), rotation.new_zeros(())
    least = torch.finfo(rotation.dtype).tiny
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        drawn = torch.randperm(n, generator=generator, device="cpu")[:ROWS].to(rotation.device)
        found = slope(rows.take(drawn).turned(rotation), old.take(drawn), scale)
        angles = _MOMENTUM * angles + (1 - _MOMENTUM) * found
        square = _SQUARES * square + (1 - _SQUARES) * found.square().mean()
        size = (square / (1 - _SQUARES ** (step + 1))).sqrt().clamp_min(least)
        length = _TURN / dim**0.5 * (1 - step / STEPS) / (1 - _MOMENTUM ** (step + 1))
        rotation = rotation @ torch.matrix_exp(-length * angles / size)
    return nearest_rotation(rotation.double().cpu())[0]


def nearest_rotation(
    cross: Tensor,  # [D, D] fp64, sum of outer products: model's row x reference's row
) -> tuple[Tensor, int]:
    """([D, D] orthogonal R of the largest tr(Rᵀ cross), rank of cross).

    Where cross says nothing, as with fewer pairs than dimensions, of all such R the one nearest to
    the identity: with U₂ and V₂ the singular vectors of what is null to fp32, R maps the one space
    to the other by the polar factor of U₂ᵀV₂.
    """
    u, s, vh = torch.linalg.svd(cross)
    rank = int((s > s[0] * torch.finfo(torch.float32).eps).sum())
    null_u, null_vh = u[:, rank:], vh[rank:]
    a, _, bh = torch.linalg.svd(null_u.T @ null_vh.T)
    return u[:, :rank] @ vh[:rank] + null_u @ (a @ bh) @ null_vh, rank
