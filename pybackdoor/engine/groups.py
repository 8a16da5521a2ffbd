"""Which parts of a model are decayed, and which modes they are trained in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_NO_DECAY_NAMES = ("bias", "ln", "bn")


def decay_groups(named: list[tuple[str, Tensor]], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: no decay for vectors, scalars and names with bias, ln or bn."""
    free = [p for n, p in named if p.ndim < 2 or any(part in n for part in _NO_DECAY_NAMES)]
    kept = {id(p) for p in free}
    decayed = [p for _, p in named if id(p) not in kept]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def set_train_mode(model: nn.Module, freeze_batchnorm: bool) -> None:
    """``train()``, with batch norm left in evaluation mode when its statistics are frozen."""
    model.train()
    if freeze_batchnorm:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation mode, module by module as it was after."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
