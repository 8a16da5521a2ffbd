"""Unit features of suspect pairs by one model, chunk by chunk, in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..batches import InputRules
from ..features import FeatureReader
from .suspects import Suspects, subset

View = Callable[[Tensor], Tensor]  # [n, 3, H, W] normalised pixels -> as many


class Reader:
    """Encodes with one model on the device it is on; its mode is restored after.

    Args:
        rules: how pixels become the model's input.
        precision: "fp32" or "bf16" autocast.
        batch_size: images or captions encoded at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: InputRules,
        precision: str = "fp32",
        batch_size: int = 256,
    ) -> None:
        self._features = FeatureReader(
            model, rules.tokenizer, mean=rules.mean, std=rules.std, batch_size=batch_size,
            precision=precision, floats=True,
        )  # fmt: skip
        self._chunk = batch_size

    def images(self, suspects: Suspects, rows: np.ndarray | None = None) -> Tensor:
        """[n, D] fp32 unit rows on the CPU, of the images at [n] rows; None: all."""
        some = suspects if rows is None else subset(suspects, rows)
        return self._features.images(some.images, some.ids)

    def check_pixels(self, image_size: tuple[int, int]) -> None:
        """Refuse uint8 images of (H, W) that the model does not take."""
        self._features.check_pixels(image_size)

    def pixels(
        self,
        images: Tensor,  # [n, H, W, 3] uint8, or normalised floats
        view: View | None = None,
    ) -> Tensor:
        """[n, D] fp32 unit rows on the CPU, of the images or of what the view shows of them."""
        read = self._features
        with read.reading():
            shown = (read.normalised(part) for part in images.split(self._chunk))
            parts = [read.encoded(x if view is None else view(x)) for x in shown]
        return torch.cat(parts)

    def viewed(
        self, suspects: Suspects, rows: np.ndarray, views: Sequence[View]
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Some of the [N] rows, and [views, n, D] unit rows of what they show, by chunks."""
        read = self._features
        for start in range(0, len(rows), self._chunk):
            some = rows[start : start + self._chunk]
            with read.reading():
                x = read.normalised(suspects.pixels(some))
                found = torch.stack([read.encoded(view(x)) for view in views])
            yield some, found

    def captions(self, suspects: Suspects) -> Tensor:
        """[U, D] fp32 unit rows on the CPU, of the different captions."""
        count = len(suspects.different)
        starts = range(0, count, self._chunk)
        parts = (np.arange(i, min(i + self._chunk, count)) for i in starts)
        return torch.cat([self.tokens(suspects.different.tokens(part)) for part in parts])

    def tokens(self, tokens: Tensor) -> Tensor:  # [n, L]
        """[n, D] fp32 unit rows on the CPU; equal rows are encoded once."""
        unique, place = tokens.unique(dim=0, return_inverse=True)
        with self._features.reading():
            parts = [self._features.tokens(part) for part in unique.split(self._chunk)]
        return torch.cat(parts)[place]


class ImageRows:
    """The suspects' image features by one model, each encoded when it is first asked for.

    Args:
        reader: of the model.
    Raises:
        ValueError: images of a size that the model does not take, pixels of unknown mean and std.
    """

    def __init__(self, reader: Reader, suspects: Suspects) -> None:
        reader.check_pixels(suspects.images.image_size)
        self._reader, self._suspects = reader, suspects
        self._known = np.zeros(len(suspects), bool)
        self._rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self._known)

    def at(self, rows: np.ndarray) -> Tensor:
        """[n, D] fp32 unit rows on the CPU, of the images at [n] rows, at least one."""
        if not len(rows):
            raise ValueError("rows must name at least one image, got none")
        new = np.unique(rows[~self._known[rows]])
        if len(new):
            found = self._reader.images(self._suspects, new)
            if self._rows is None:
                self._rows = found.new_empty(len(self), found.shape[1])
            self._rows[torch.from_numpy(new)] = found
            self._known[new] = True
        assert self._rows is not None
        return self._rows[torch.from_numpy(rows)]

    def all(self) -> Tensor:
        """[N, D]."""
        if not self._known.any():
            self._rows = self._reader.images(self._suspects)
            self._known[:] = True
        return self.at(np.arange(len(self)))


def pair_cosines(image: Tensor, captions: Tensor, suspects: Suspects) -> np.ndarray:
    """[N] float64 cosines of the pairs; image [N, D], captions [U, D], unit rows."""
    found = []
    for start in range(0, len(image), 1 << 16):
        which = torch.from_numpy(suspects.caption[start : start + (1 << 16)])
        found.append((image[start : start + (1 << 16)] * captions[which]).sum(-1).double())
    return torch.cat(found).numpy()
