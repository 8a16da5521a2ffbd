"""The objective that most methods share or build on: CLIP's own loss."""

from __future__ import annotations

from torch import Tensor

from ..ops import contrastive_par
from .objective import Given, Objective


class Contrastive(Objective):
    """CLIP's own loss and nothing else."""

    shardable = True

    def __init__(self, precision: str = "auto") -> None:
        self._precision = precision

    def __call__(
        self,
        image: Tensor,  # [n, D] unit rows
        text: Tensor,  # [n, D] unit rows
        scale: Tensor,  # []
        reference: tuple[Tensor, ...],
        given: Given,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        options = {"normalize": False, "precision": self._precision, "counts": given.counts}
        return contrastive_par(text, image, scale, **options).loss, {}
