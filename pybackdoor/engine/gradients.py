"""The loss and the gradients of one batch, encoded whole or in micro-batches.

In micro-batches: all features are computed without a graph, the loss of the whole batch gives
their gradients, and each micro-batch is encoded again to pass its part on (gradient caching, arXiv
2101.06983). Loss and gradients are those of the whole batch; the memory is a micro-batch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models import scale
from .lock import LockedText
from .objective import Given, Objective, takes_own_rows
from .towers import Captions, Encoder, rows_of_turn


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
        self._locked, self._own_rows = locked, takes_own_rows(objective)
        self._model, self._objective, self._encode = model, objective, encode
        self._train_scale, self._micro, self._seed = train_scale, micro_batch, seed
        if micro_batch is not None and _has_live_batchnorm(model):
            raise ValueError(
                "micro_batch cannot be used while batch norm takes its statistics from the batch"
            )

    def __call__(
        self,
        x: Tensor,  # [r, 3, H, W] normalised
        tokens: Tensor | Captions,  # [k, L]
        given: Given,
    ) -> Outcome:
        size = self._micro or max(len(x), len(tokens))
        towers = ((self._encode.image, x), (self._encode.text, tokens))
        turns = [1 if self._micro is None else self._encode.turns(len(r), size) for _, r in towers]
        whole = max(turns) == 1

        def parts(tower: int) -> Iterator[tuple[int, Tensor]]:
            encode, rows = towers[tower]
            for start in range(0, turns[tower] * size, size):
                part, place = rows_of_turn(rows, start, size), 2 * start + tower
                yield start, self._student(encode, part, given.step, place)

        with torch.set_grad_enabled(whole):
            image = torch.cat([rows for _, rows in parts(0)])[: len(x)]
            if self._locked is None:
                text = torch.cat([rows for _, rows in parts(1)])[: len(tokens)]
            else:
                text = self._locked(tokens, given.numbers if self._own_rows else None)
        if not whole:
            image.requires_grad_()
            text.requires_grad_(self._locked is None)
        with torch.no_grad():
            fixed = self._objective.reference(x, tokens, given)
        temperature = self._model.logit_scale.exp() if self._train_scale else scale(self._model)
        loss, terms = self._objective(image, text, temperature, fixed, given)
        loss.backward()
        if not whole:
            for tower, grad in enumerate((image.grad, text.grad)):
                for start, features in parts(tower) if grad is not None else ():
                    if features.requires_grad:
                        own = grad[start : start + size]
                        features.backward(own if len(own) else torch.zeros_like(features))
        scalars = {name: t.detach() for name, t in {"loss": loss, **terms}.items()}
        named = {"image features": image.detach(), "text features": text.detach()}
        named |= {f"reference features {i}": rows.detach() for i, rows in enumerate(fixed)}
        return Outcome(scalars, named)

    def _student(
        self, encode: Callable[..., Tensor], rows: Tensor | Captions, step: int, place: int
    ) -> Tensor:  # [n, D]
        """Features, with the same dropout whenever these rows are encoded in this step."""
        seed = (self._seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + place) % 2**63
        torch.default_generator.manual_seed(seed)
        if next(self._model.parameters()).is_cuda:
            torch.cuda.manual_seed(seed)  # of this device alone
        return encode(self._model, rows)


def _has_live_batchnorm(model: nn.Module) -> bool:
    kinds = nn.modules.batchnorm._BatchNorm
    return any(isinstance(m, kinds) and m.training for m in model.modules())
