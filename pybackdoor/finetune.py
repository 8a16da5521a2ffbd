"""Plain contrastive fine-tuning: PAR's engine, data and schedule without the perturbation term.

It is the matched control of every cleaning run: what the same pairs and compute give by themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Tokenizer
from .clean import CleanResult, augmentation, clean, two_phase_schedule
from .engine import Settings, StepHook, loss_precision
from .ops import Augment, contrastive_par


class Contrastive:
    """CLIP's own loss and nothing else."""

    def __init__(self, precision: str = "auto") -> None:
        self._precision = precision

    def reference(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        return ()

    def __call__(
        self,
        image: Tensor,  # [n, D] unit rows
        text: Tensor,  # [n, D] unit rows
        scale: Tensor,  # []
        reference: tuple[Tensor, ...],
        counts: list[int] | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        options = {"normalize": False, "precision": self._precision, "counts": counts}
        return contrastive_par(text, image, scale, **options).loss, {}


def finetune_clean(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    epochs: int = 2,
    steps: int | None = None,
    lr_start: float = 3e-5,
    lr: float = 3e-6,
    lr_end: float = 1e-9,
    weight_decay: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.98),
    augment: bool | Augment = True,
    precision: str = "bf16",
    seed: int = 0,
    device: str | torch.device | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    tokenizer: Tokenizer | None = None,
    progress: bool | None = None,
    on_step: StepHook | None = None,
) -> CleanResult:
    """Fine-tune a CLIP model on clean pairs: ``par_clean`` without its perturbation term.

    Arguments, result and errors are those of ``par_clean``; the same seed gives the same batches
    and the same augmentation, so that the two differ in the objective alone.
    """
    settings = Settings(
        steps, epochs, weight_decay, betas, augmentation(augment), precision, seed,
        progress=progress,
    )  # fmt: skip
    return clean(
        "finetune", model, loader, lambda _: Contrastive(loss_precision(precision)),
        two_phase_schedule(lr_start, lr, lr_end), settings,
        mean=mean, std=std, tokenizer=tokenizer, device=device, on_step=on_step,
        own={"lr_start": lr_start, "lr": lr, "lr_end": lr_end},
    )  # fmt: skip
