"""What a frozen tower gives for all of the data, computed once instead of at each step."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import Ranks
from .groups import evaluating
from .images import ImageFeatures, recurring
from .settings import Settings
from .texts import CaptionFeatures, NoRoom, worth_it
from .towers import Encoder, TextTrim
from .watch import Watch


class Known:
    """Features by number of the caption, and by id and view of the image, where that pays.

    Args:
        steps: of the run.
        own_rows: whether the towers get each batch as the loader gives it, augmented or not.
    Attributes:
        numbered: whether captions go by the loader's numbers.
    """

    def __init__(
        self,
        loader: Any,
        settings: Settings,
        steps: int,
        encode: Encoder,
        trim: TextTrim,
        device: torch.device,
        ranks: Ranks,
        watch: Watch,
        own_rows: bool,
    ) -> None:
        self._encode, self._trim, self._device = encode, trim, device
        self._ranks, self._watch, self._views = ranks, watch, settings.views
        self._compiled = settings.compile is not None
        self._kept: list[ImageFeatures] = []
        pairs = steps * (getattr(loader, "batch_size", None) or 0)
        self._captions = getattr(loader, "captions", None) if settings.cache_text else None
        self.numbered = self._captions is not None and worth_it(self._captions, pairs)
        self._ids = None
        if settings.views is not None and own_rows:
            self._ids = recurring(loader, settings.views, pairs)

    def texts(self, model: nn.Module) -> CaptionFeatures | None:
        """Of all captions; None where they are encoded as they come."""
        if not self.numbered:
            return None
        eager = self._encode.eager()

        def encode(tokens: Tensor) -> Tensor:
            with evaluating(model), eager.products(model):
                return eager.text(model, self._trim(tokens).to(self._device))

        try:
            return CaptionFeatures(self._captions, encode, self._ranks, self._watch)
        except NoRoom as reason:
            warnings.warn(str(reason), UserWarning, stacklevel=2)
            self.numbered = False
            return None

    def images(self, model: nn.Module) -> ImageFeatures | None:
        """Of each batch announced by ``begin``; None where no view of an image comes again."""
        if self._ids is None or self._views is None:
            return None
        encode = partial(self._encode.image, model)
        kept = ImageFeatures(
            self._ids, self._views, encode, self._ranks, self._watch, whole=self._compiled
        )
        self._kept.append(kept)
        return kept

    def begin(self, ids: Tensor, epoch: int) -> None:  # [n]
        for kept in self._kept:
            kept.begin(ids, epoch)
