"""The loss and the gradients of one batch, encoded whole or in micro-batches.

In micro-batches: all features are computed without a graph, the loss of the whole batch gives
their gradients, and each micro-batch is encoded again to pass its part on (gradient caching, arXiv
2101.06983). Loss and gradients are those of the whole batch; the memory is a micro-batch's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models import scale
from .lock import LockedText
from .settings import Objective
from .towers import Captions, Encoder


class Outcome(NamedTuple):
    """What a batch gave, besides the parameters' gradients; all without a graph."""

    scalars: dict[str, Tensor]  # [] each: the loss and the method's terms
    features: dict[str, Tensor]  # [n, D] each, by a name for people


class Gradients:
    """Computes them into ``.grad`` of the model's parameters.

    Args:
        train_scale: whether logit_scale takes a gradient.
        micro_batch: pairs encoded at a time; None: all.
        seed: of dropout, with the step and the rank.
        locked: gives the text features where the text tower is not trained.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        encode: Encoder,
        *,
        train_scale: bool,
        micro_batch: int | None,
        seed: int,
        locked: LockedText | None = None,
    ) -> None:
        self._locked = locked
        self._model, self._objective, self._encode = model, objective, encode
        self._train_scale, self._micro, self._seed = train_scale, micro_batch, seed
        if micro_batch is not None and _has_live_batchnorm(model):
            raise ValueError(
                "micro_batch cannot be used while batch norm takes its statistics from the batch"
            )

    def __call__(
        self,
        step: int,
        x: Tensor,  # [n, 3, H, W] normalised
        tokens: Tensor | Captions,  # [n, L]
        numbers: Tensor | None,  # [n] of the captions, see Objective.prepare
        counts: list[int] | None,
    ) -> Outcome:
        size = self._micro or len(x)
        parts = [slice(i, i + size) for i in range(0, len(x), size)]
        whole = len(parts) == 1
        with torch.set_grad_enabled(whole):
            images, texts, constants = [], [], []
            for number, part in enumerate(parts):
                which = None if numbers is None else numbers[part]
                images.append(self._image(step, number, x[part]))
                texts.append(self._text(tokens[part], which))
                constants.append(self._objective.reference(x[part], tokens[part], which))
        if whole:
            image, text = images[0], texts[0]
        else:
            image, text = torch.cat(images).requires_grad_(), torch.cat(texts)
            text.requires_grad_(self._locked is None)
        fixed = tuple(
            rows[0] if whole else torch.cat(rows) for rows in zip(*constants, strict=True)
        )
        temperature = self._model.logit_scale.exp() if self._train_scale else scale(self._model)
        loss, terms = self._objective(image, text, temperature, fixed, counts)
        loss.backward()
        if not whole:
            for number, part in enumerate(parts):
                again = [self._image(step, number, x[part])]
                if self._locked is None:
                    again.append(self._text(tokens[part], None))
                for features, grad in zip(again, (image.grad, text.grad), strict=False):
                    if features.requires_grad and grad is not None:
                        features.backward(grad[part])
        scalars = {name: t.detach() for name, t in {"loss": loss, **terms}.items()}
        named = {"image features": image.detach(), "text features": text.detach()}
        named |= {f"reference features {i}": rows.detach() for i, rows in enumerate(fixed)}
        return Outcome(scalars, named)

    def _image(self, step: int, part: int, x: Tensor) -> Tensor:
        seed = (self._seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + part) % 2**63
        torch.default_generator.manual_seed(seed)
        if x.is_cuda:
            torch.cuda.manual_seed(seed)  # of this device alone
        return self._encode.image(self._model, x)

    def _text(self, tokens: Tensor | Captions, numbers: Tensor | None) -> Tensor:
        """Right after the image tower: dropout draws on from there."""
        if self._locked is not None:
            return self._locked(tokens, numbers)
        return self._encode.text(self._model, tokens)


def _has_live_batchnorm(model: nn.Module) -> bool:
    kinds = nn.modules.batchnorm._BatchNorm
    return any(isinstance(m, kinds) and m.training for m in model.modules())
