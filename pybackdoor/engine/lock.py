"""A text tower that is left as it is while the image tower is trained."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..models import text_features
from .groups import evaluating
from .towers import Captions, Encoder


class LockedText:
    """The text tower of a model whose image tower alone is trained: no gradient, no dropout.

    Attributes:
        features: of the numbered captions, where they are computed once.
    """

    def __init__(self, model: nn.Module, encode: Encoder) -> None:
        self._model, self._encode = model, encode
        self._freed = True
        self.features: Callable[[Tensor], Tensor] | None = None

    def freeze(self, tokens: Tensor | Captions) -> None:  # [n, L]
        """Freeze all parameters that captions reach, those the image tower shares included.

        Raises:
            ValueError: no other is left to train.
        """
        if not self._freed:
            return
        shown = tokens if isinstance(tokens, Tensor) else tokens.tokens
        trained = [p for p in self._model.parameters() if p.requires_grad]
        with evaluating(self._model), torch.enable_grad():
            features = text_features(self._model, shown[:1])
        reached = [None] * len(trained)
        if features.requires_grad:
            reached = torch.autograd.grad(features.sum(), trained, allow_unused=True)
        for p, grad in zip(trained, reached, strict=True):
            p.requires_grad_(grad is None)
        if all(grad is not None for grad in reached):
            raise ValueError("lock='text' leaves nothing to train: the image tower is the text's")
        self._freed = False

    @torch.no_grad()
    def __call__(self, tokens: Tensor | Captions, numbers: Tensor | None) -> Tensor:
        """[n, D] unit rows."""
        if self.features is not None and numbers is not None:
            return self.features(numbers)
        with evaluating(self._model):
            return self._encode.text(self._model, tokens)
