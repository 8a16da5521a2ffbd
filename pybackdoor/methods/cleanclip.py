"""CleanCLIP (arXiv 2303.03323): fine-tune on clean pairs, and within each modality.

Besides CLIP's own loss, each image and each caption is drawn to an augmented view of itself, away
from the views of the others, so that features are learnt without the link from trigger to caption:

    L = L_CLIP(x, t) + weight/2 [CE(s Φ Φ'ᵀ, I) + CE(s Ψ Ψ'ᵀ, I)]

Φ, Ψ: features of images and captions, primes: of their augmented views (AutoAugment, EDA); s: the
learned scale. The in-modal terms go from the plain to the augmented view only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..clean import CleanOptions, CleanResult, clean
from ..data.eda import Synonyms
from ..engine import Contrastive, Given, Preparation, Settings, loss_precision
from ..ops import contrastive_par
from ._views import AugmentedViews


class InModalContrastive(Contrastive):
    """CLIP's loss and the in-modal terms; both views pass the towers as one batch."""

    def __init__(self, views: AugmentedViews, weight: float, precision: str = "auto") -> None:
        super().__init__(precision)
        self._views, self._weight = views, weight

    def prepare(self, run: Preparation) -> None:
        self._views.prepare(run)

    def inputs(self, given: Given) -> tuple[Tensor, Tensor]:
        images = torch.cat([given.images(), self._views.images(given)])
        return images, torch.cat([given.batch.tokens.cpu(), self._views.tokens(given).cpu()])

    def __call__(
        self,
        image: Tensor,  # [2 n, D] unit rows: plain, then augmented
        text: Tensor,  # [2 n, D] likewise
        scale: Tensor,  # []
        reference: tuple[Tensor, ...],
        given: Given,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        (x, x_view), (t, t_view) = image.chunk(2), text.chunk(2)
        clip, _ = super().__call__(x, t, scale, reference, given)
        in_image = self._one_way(x, x_view, scale, given)
        in_text = self._one_way(t, t_view, scale, given)
        loss = clip + 0.5 * self._weight * (in_image + in_text)
        return loss, {"contrastive": clip, "in_modal_image": in_image, "in_modal_text": in_text}

    def _one_way(self, plain: Tensor, view: Tensor, scale: Tensor, given: Given) -> Tensor:
        """Mean cross entropy of each plain row against all views."""
        each = 1 / (sum(given.counts) if given.counts else len(plain))
        weight = torch.full((len(plain),), each, dtype=plain.dtype, device=plain.device)
        return contrastive_par(
            plain, view, scale, weight=weight, normalize=False, precision=self._precision,
            counts=given.counts,
        ).loss  # fmt: skip


def cleanclip_clean(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    in_modal_weight: float = 1.0,
    synonyms: Synonyms | None = None,
    **options: Unpack[CleanOptions],
) -> CleanResult:
    """Remove a backdoor from a CLIP model by CleanCLIP, at about twice fine-tuning's cost.

    logit_scale is trained and kept at or below ln 100, as in the paper. The schedule is that of
    every method here, so that methods are compared at equal compute; the paper's own is lr 1e-5
    after 50 steps of warm-up, then cosine to 0, weight_decay 0.1, betas (0.9, 0.999), batches of
    64, 10 epochs of 100,000 pairs. It weakens simple triggers, and fails against triggers that were
    optimised for CLIP and models that were trained with self-supervision (arXiv 2311.14948).

    Args:
        model, loader: as for ``par_clean``, images as uint8 pixels. The second wording of the
            captions comes from a PairLoader's own, from strings (with ``tokenizer``), or from the
            batches' key ``augmented`` ([n, L] tokens).
        in_modal_weight: of the two in-modal terms; at least 0.
        synonyms: (lower-case word) -> other words for it, used by EDA; default WordNet's, where
            nltk and its corpus are installed (``eda`` extra), else none: the report says which.
    Options: those of ``par_clean``, but ``augment`` (PAR's, of the plain view) is False here.
    Returns:
        As ``par_clean``; the history holds contrastive, in_modal_image and in_modal_text.
    Raises:
        TypeError, ValueError, NonFiniteError, RuntimeError, KeyboardInterrupt: as ``par_clean``.
    Source: arXiv 2303.03323, sections 4 and 5.
    """
    if not 0 <= in_modal_weight < math.inf:
        raise ValueError(f"in_modal_weight must be at least 0 and finite, got {in_modal_weight}")
    views = AugmentedViews("cleanclip_clean", synonyms)

    def objective(student: nn.Module, settings: Settings) -> InModalContrastive:
        return InModalContrastive(views, in_modal_weight, loss_precision(settings.precision))

    own = {"in_modal_weight": in_modal_weight, "synonyms": views.synonyms}
    fixed = {"freeze_scale": False}
    options = {"augment": False, **options}
    return clean("cleanclip", model, loader, objective, own, fixed, **options)
