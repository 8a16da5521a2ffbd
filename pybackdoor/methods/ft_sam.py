"""FT-SAM: fine-tuning on clean pairs with sharpness-aware minimisation (arXiv 2304.11823).

The gradient is taken where the loss is highest nearby, to first order, instead of at the weights:

    g(w + rho g / ‖g‖)                         plain (arXiv 2010.01412), or
    g(w + rho T² g / ‖T g‖),   T = diag |w|    adaptive, as FT-SAM has it

so that the large weights on which a backdoor rests shrink. g and its norm are those of the whole
batch of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..clean import CleanOptions, CleanResult, clean
from ..distributed import Ranks
from ..engine import Captions, Contrastive, Given, Preparation, Settings, loss_precision
from ..engine.gradients import Outcome

_LEAST = 1e-12  # where the gradient vanishes there is nowhere to go


class SharpnessAware(Contrastive):
    """CLIP's loss, with its gradients taken at the weights moved uphill by rho."""

    shardable = False  # it looks at whole weights and gradients

    def __init__(self, rho: float, adaptive: bool, precision: str = "auto") -> None:
        super().__init__(precision)
        self._rho, self._adaptive = rho, adaptive

    def prepare(self, run: Preparation) -> None:
        self._trained = [p for p in run.model.parameters() if p.requires_grad]
        self._ranks = run.ranks or Ranks()

    def around(self, gradients: Callable[..., Outcome]) -> Callable[..., Outcome]:
        def uphill(x: Tensor, tokens: Tensor | Captions, given: Given) -> Outcome:
            here = gradients(x, tokens, given)
            self._ranks.sum_gradients(self._trained)
            moved = [p for p in self._trained if p.grad is not None]
            before = [p.detach().clone() for p in moved]
            try:
                self._ascend(moved)
                for p in moved:
                    p.grad = None
                there = gradients(x, tokens, given)
            finally:  # also where the second pass fails, or is interrupted
                with torch.no_grad():
                    for p, weight in zip(moved, before, strict=True):
                        p.copy_(weight)
            scalars = {**here.scalars, "loss_uphill": there.scalars["loss"]}
            return here._replace(scalars=scalars)

        return uphill

    @torch.no_grad()
    def _ascend(self, parameters: list[nn.Parameter]) -> None:
        """Along the gradients, which are used up; a norm that is no number makes weights none."""
        directions = [p.grad for p in parameters]
        if self._adaptive:
            directions = [g.mul_(p.abs()) for g, p in zip(directions, parameters, strict=True)]
        norm = nn.utils.get_total_norm(directions)
        stride = self._rho / norm.clamp(min=_LEAST)
        for p, direction in zip(parameters, directions, strict=True):
            p.addcmul_(direction.mul_(p.abs()) if self._adaptive else direction, stride)


def ft_sam_clean(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    rho: float = 0.05,
    adaptive: bool = False,
    **options: Unpack[CleanOptions],
) -> CleanResult:
    """Fine-tune a CLIP model on clean pairs with sharpness-aware minimisation.

    ``finetune_clean`` at twice its cost, and with a second copy of the weights in memory. The paper
    treats classifiers, with few labelled images; this is its optimiser under CLIP's loss.

    Args:
        model, loader: as for ``par_clean``.
        rho: length of the step uphill, in the norm of all trained weights; above 0. With a high
            learning rate a long step can collapse a contrastive model: the loss then stays at
            ln(batch size). Lower either.
        adaptive: scale the step by the weights' magnitudes, as FT-SAM does; its rho is then
            relative to them, and a larger one is usual.
    Options: those of ``par_clean``.
    Returns:
        As ``par_clean``; the history holds loss_uphill beside the loss at the weights themselves.
    Raises:
        TypeError, ValueError, NonFiniteError, RuntimeError, KeyboardInterrupt: as ``par_clean``.
    Source: arXiv 2010.01412, algorithm 1; arXiv 2304.11823; arXiv 2102.11600 (adaptive step).
    """
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be above 0 and finite, got {rho}")

    def objective(student: nn.Module, settings: Settings) -> SharpnessAware:
        return SharpnessAware(rho, adaptive, loss_precision(settings.precision))

    own = {"rho": rho, "adaptive": adaptive}
    return clean("ft_sam", model, loader, objective, own, **options)
