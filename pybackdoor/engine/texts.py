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

from .._native import sent
from ..distributed import Ranks
from .banks import bank, looked_up, of_host
from .watch import Watch

_CHUNK = 512  # captions encoded at a time


class NumberedCaptions(Protocol):
    """The different captions of a loader, by number."""

    def __len__(self) -> int: ...

    def lengths(self) -> np.ndarray:
        """[n] tokens of each, without padding."""

    def tokens(self, numbers: np.ndarray) -> Tensor:  # [b]
        """[b, L] int64."""


class NoRoom(Exception):
    """The features do not fit into memory."""


class CaptionFeatures:
    """[n, D] features in a bank; the same bits whenever and by however many ranks.

    Args:
        encode: [b, L] tokens on the CPU -> [b, D] features on the device.
    Raises:
        NoRoom: on every rank, where one has no memory for them.
    """

    def __init__(
        self,
        captions: NumberedCaptions,
        encode: Callable[[Tensor], Tensor],
        ranks: Ranks,
        watch: Watch,
    ) -> None:
        order = np.argsort(captions.lengths(), kind="stable")
        with torch.no_grad(), watch.patient():
            starts = range(0, len(order), _CHUNK)
            for first in range(0, len(starts), ranks.size):  # as often on every rank
                number = min(first + ranks.rank, len(starts) - 1)
                chunk = order[starts[number] : starts[number] + _CHUNK]
                rows = encode(captions.tokens(chunk))
                if first == 0:
                    self._device = rows.device
                    self._bank = _room((len(order), rows.shape[1]), rows, ranks)
                every = torch.from_numpy(order[starts[first] :][: ranks.size * _CHUNK])
                if ranks.size > 1:  # of one rank's row and zeros
                    mine, rows = rows, rows.new_zeros(len(every), rows.shape[1])
                    if number == first + ranks.rank:
                        rows[ranks.rank * _CHUNK :][: len(mine)] = mine
                    ranks.sum_(rows)
                self._bank[every.to(self._bank.device)] = rows.to(self._bank.device)

    def __call__(self, numbers: Tensor) -> Tensor:  # [b] -> [b, D]
        if self._bank.is_cuda:
            numbers = sent(numbers, self._device)
        return looked_up(self._bank, numbers, self._device)


def _room(shape: tuple[int, int], rows: Tensor, ranks: Ranks) -> Tensor:
    """A bank on every rank, or on none."""
    found = bank(shape, rows)
    if not all(there for (there,) in ranks.agree([found is not None], rows.device)):
        needed = shape[0] * shape[1] * rows.element_size()
        raise NoRoom(
            f"the frozen model's features of {shape[0]:,} captions take {needed:,} bytes, at most "
            f"{of_host():,} are given to them: they are computed at every step instead of once"
        )
    assert found is not None
    return found


def worth_it(captions: NumberedCaptions, pairs: int) -> bool:
    """Whether as many pairs will be seen as there are captions."""
    return 0 < len(captions) <= pairs
