"""Unit features of suspect pairs by one model, chunk by chunk, in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ..batches import InputRules, model_input
from ..engine import PRECISIONS, Encoder, TextTrim
from .suspects import Suspects

_CHUNK = 256


class Reader:
    """Encodes with one model on the device it is on; its mode is restored after.

    Args:
        rules: how pixels become the model's input.
        precision: "fp32" or "bf16" autocast.
    """

    def __init__(self, model: nn.Module, rules: InputRules, precision: str = "fp32") -> None:
        self._model, self._rules = model, rules
        self._device = next(model.parameters()).device
        self._encode = Encoder(PRECISIONS[precision], self._device)
        self._trim = TextTrim(model, wanted=True, grouped=self._device.type == "cpu")

    def images(self, suspects: Suspects, rows: np.ndarray | None = None) -> Tensor:
        """[n, D] fp32 unit rows on the CPU, of the images at [n] rows; None: all."""
        rows = np.arange(len(suspects)) if rows is None else rows
        parts = (rows[i : i + _CHUNK] for i in range(0, len(rows), _CHUNK))
        return torch.cat([self.pixels(suspects.pixels(part)) for part in parts])

    def pixels(self, images: Tensor) -> Tensor:  # [n, H, W, 3] uint8, or normalised floats
        """[n, D] fp32 unit rows on the CPU."""
        with _evaluating(self._model):
            parts = [self._encoded(self._input(part)) for part in images.split(_CHUNK)]
        return torch.cat(parts)

    def viewed(
        self, suspects: Suspects, views: Sequence[Callable[[Tensor], Tensor]]
    ) -> Iterator[tuple[slice, Tensor]]:
        """Chunk after chunk: the rows, and [views, n, D] unit rows of what each view shows.

        Args:
            views: normalised [n, 3, H, W] -> the same shape.
        """
        for start in range(0, len(suspects), _CHUNK):
            rows = slice(start, min(start + _CHUNK, len(suspects)))
            with _evaluating(self._model):
                x = self._input(suspects.pixels(np.arange(rows.start, rows.stop)))
                found = torch.stack([self._encoded(view(x)) for view in views])
            yield rows, found

    def _input(self, images: Tensor) -> Tensor:  # at least fp32, for the views
        dtype = torch.promote_types(self._encode.input_dtype(self._model), torch.float32)
        ids = torch.arange(len(images))
        return model_input(images, self._rules, device=self._device, dtype=dtype, ids=ids)

    def _encoded(self, x: Tensor) -> Tensor:
        x = x.to(self._encode.input_dtype(self._model))
        return _finite(self._encode.image(self._model, x).float().cpu(), "image")

    def captions(self, suspects: Suspects) -> Tensor:
        """[U, D] fp32 unit rows on the CPU, of the different captions."""
        count = len(suspects.different)
        parts = (np.arange(i, min(i + _CHUNK, count)) for i in range(0, count, _CHUNK))
        return torch.cat([self.tokens(suspects.different.tokens(part)) for part in parts])

    def tokens(self, tokens: Tensor) -> Tensor:  # [n, L]
        """[n, D] fp32 unit rows on the CPU; equal rows are encoded once."""
        unique, place = tokens.unique(dim=0, return_inverse=True)
        found = []
        with _evaluating(self._model):
            for part in unique.split(_CHUNK):
                x = self._trim(part).to(self._device)
                found.append(self._encode.text(self._model, x).float().cpu())
        return _finite(torch.cat(found), "text")[place]


def pair_cosines(image: Tensor, captions: Tensor, suspects: Suspects) -> np.ndarray:
    """[N] float64 cosines of the pairs; image [N, D], captions [U, D], unit rows."""
    found = []
    for start in range(0, len(image), 1 << 16):
        which = torch.from_numpy(suspects.caption[start : start + (1 << 16)])
        found.append((image[start : start + (1 << 16)] * captions[which]).sum(-1).double())
    return torch.cat(found).numpy()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _finite(features: Tensor, tower: str) -> Tensor:
    bad = int((~features.isfinite()).any(-1).sum())
    if bad:
        raise ValueError(f"the model's {tower} features of {bad} of {len(features)} are not finite")
    return features
