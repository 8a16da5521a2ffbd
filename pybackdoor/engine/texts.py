"""A frozen tower's features of all captions, computed once instead of at every step.

A caption is not augmented, so that what a frozen tower makes of it never changes. Sorted by length
and cut to it, all captions of a data set cost less than one epoch's batches, each of which is as
long as its longest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..distributed import Ranks
from .watch import Watch

MOST = 1 << 20  # captions whose features are kept on the device: 2 GiB at 512 dimensions
_CHUNK = 512  # captions encoded at a time


class NumberedCaptions(Protocol):
    """The different captions of a loader, by number."""

    def __len__(self) -> int: ...

    def lengths(self) -> np.ndarray:
        """[n] tokens of each, without padding."""

    def tokens(self, numbers: np.ndarray) -> Tensor:  # [b]
        """[b, L] int64."""


class CaptionFeatures:
    """[n, D] features on the device; the same bits whenever and by however many ranks.

    Args:
        encode: [b, L] tokens on the CPU -> [b, D] features on the device.
    """

    def __init__(
        self,
        captions: NumberedCaptions,
        encode: Callable[[Tensor], Tensor],
        ranks: Ranks,
        watch: Watch,
    ) -> None:
        order = np.argsort(captions.lengths(), kind="stable")
        self.features: Tensor | None = None
        with torch.no_grad(), watch.patient():
            starts = range(0, len(order), _CHUNK)
            for first in range(0, len(starts), ranks.size):  # as often on every rank
                number = min(first + ranks.rank, len(starts) - 1)
                chunk = order[starts[number] : starts[number] + _CHUNK]
                rows = encode(captions.tokens(chunk))
                if self.features is None:
                    self.features = rows.new_zeros(len(order), rows.shape[1])
                if number == first + ranks.rank:
                    self.features[torch.from_numpy(chunk).to(rows.device)] = rows
            assert self.features is not None
            ranks.sum_(self.features)

    def __call__(self, numbers: Tensor) -> Tensor:  # [b] -> [b, D]
        return self.features[numbers.to(self.features.device, non_blocking=True)]


def worth_it(captions: NumberedCaptions, pairs: int) -> bool:
    """Whether as many pairs will be seen as there are captions, and their features fit."""
    return 0 < len(captions) <= min(pairs, MOST)
