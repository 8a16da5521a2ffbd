"""Plain contrastive fine-tuning: PAR's engine, data and schedule without the perturbation term.

It is the matched control of every cleaning run: what the same pairs and compute give by themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from typing_extensions import Unpack

from ..clean import CleanOptions, CleanResult, clean
from ..engine import Contrastive, Settings, loss_precision


def finetune_clean(
    model: nn.Module, loader: Iterable[Any], **options: Unpack[CleanOptions]
) -> CleanResult:
    """Fine-tune a CLIP model on clean pairs: ``par_clean`` without its perturbation term.

    Options, result and errors are those of ``par_clean``; the same seed gives the same batches
    and the same augmentation, so that the two differ in the objective alone.
    """

    def objective(student: nn.Module, settings: Settings) -> Contrastive:
        return Contrastive(loss_precision(settings.precision))

    return clean("finetune", model, loader, objective, {}, **options)
