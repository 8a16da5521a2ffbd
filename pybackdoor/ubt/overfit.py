"""Stage B: overfit a copy of the model on the weak pool, the weakest pairs first.

Poisoned pairs share one rule from trigger to text and gain together; noisy pairs gain slowly.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..batches import InputRules
from ..clean import trainable_copy
from ..distributed import Ranks
from ..engine import Contrastive, Given, Objective, Settings, kept_heap, train
from .suspects import RowLoader, Suspects
from .weak import one_of, priorities

LOSSES = ("cosine", "contrastive")


class MeanCosine(Objective):
    """L = -mean cosine of image and caption, over the batch of all ranks."""

    def __call__(
        self,
        image: Tensor,  # [n, D] unit rows
        text: Tensor,  # [n, D] unit rows
        scale: Tensor,  # []
        reference: tuple[Tensor, ...],
        given: Given,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        total = sum(given.counts) if given.counts else len(image)
        return Ranks().whole(-(image * text).sum() / total), {}


def overfit(
    model: nn.Module,
    suspects: Suspects,
    pool: np.ndarray,  # [m] rows, the weakest first
    *,
    rules: InputRules,
    device: torch.device,
    steps: int = 200,
    lr: float = 1e-5,
    batch_size: int = 128,
    loss: str = "contrastive",
    precision: str = "fp32",
    seed: int = 0,
    progress: bool | None = None,
) -> nn.Module:
    """A copy of the model after a short overfit on the pool, in evaluation mode.

    Pairs are drawn with a probability that falls linearly from the weakest on; the learning rate is
    constant, logit_scale and batch norm's statistics stay.

    Args:
        loss: "contrastive" is CLIP's own, "cosine" is -mean cosine.
    """
    one_of("overfit_loss", loss, LOSSES)
    copy = trainable_copy(model, device)
    settings = Settings(
        steps=steps, weight_decay=0.0, precision=precision, seed=seed, progress=progress
    )
    loader = RowLoader(
        suspects, pool, batch_size=batch_size, seed=seed, priority=priorities(len(pool))
    )
    objective = MeanCosine() if loss == "cosine" else Contrastive()
    with kept_heap(device):
        train(copy, loader, objective, lambda k, n: lr, settings, rules=rules, device=device)
    return copy.eval()
