"""Image-text retrieval: recall at 1, 5 and 10, both ways."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .data import Pairs
from .estimates import Estimate
from .features import FeatureReader
from .triggers import TriggerSpec

KS = (1, 5, 10)
_ROWS = 1024  # queries a time: at 25,000 candidates their similarities take 100 MB


@dataclass(frozen=True)
class Recalls:
    """R@k with the number of queries: ``image_to_text[k]`` and ``text_to_image[k]``."""

    image_to_text: dict[int, Estimate]
    text_to_image: dict[int, Estimate]


class Retrieval:
    """Search over the distinct images and distinct captions of a set of pairs.

    Rows that name the same file are one image with several captions; equal captions are one text
    that every image carrying it matches. A query counts at k when one of its matches is among the
    first k; what does not match but scores as high as the best match ranks before it.
    """

    def __init__(self, reader: FeatureReader, pairs: Pairs) -> None:
        self._reader = reader
        self._image_of, first = _numbered(pairs.locations)
        self._text_of, _ = _numbered(pairs.captions)
        self._chosen = pairs.subset(first)
        self._texts = reader.captions(list(dict.fromkeys(pairs.captions)))

    def recalls(self, trigger: TriggerSpec | None = None) -> Recalls:
        """R@1/5/10 both ways, of the images as they are or with the trigger on."""
        images = self._reader.images(self._chosen.images, self._chosen.ids, trigger)
        return Recalls(
            _recalls(images, self._texts, self._image_of, self._text_of),
            _recalls(self._texts, images, self._text_of, self._image_of),
        )


def _numbered(keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Number distinct keys by first appearance: (number of each row, first row of each number)."""
    number: dict[str, int] = {}
    of = np.array([number.setdefault(key, len(number)) for key in keys])
    _, first = np.unique(of, return_index=True)
    return of, first


def _recalls(
    queries: Tensor,  # [Q, D] unit rows
    candidates: Tensor,  # [C, D] unit rows
    query_of: np.ndarray,  # [pairs] query of each pair
    candidate_of: np.ndarray,  # [pairs] candidate of each pair
) -> dict[int, Estimate]:
    order = np.argsort(query_of, kind="stable")
    query_of, candidate_of = query_of[order], candidate_of[order]
    ranks = torch.cat(list(_ranks(queries, candidates, query_of, candidate_of)))
    return {k: Estimate.rate(int((ranks < k).sum()), len(ranks)) for k in KS}


def _ranks(
    queries: Tensor, candidates: Tensor, query_of: np.ndarray, candidate_of: np.ndarray
) -> Iterator[Tensor]:
    """Rank of each query's best match: how many non-matches score at least as high."""
    for start in range(0, len(queries), _ROWS):
        scores = queries[start : start + _ROWS] @ candidates.T
        lo, hi = np.searchsorted(query_of, [start, start + len(scores)])
        rows = torch.from_numpy(query_of[lo:hi] - start)
        match = torch.zeros_like(scores, dtype=torch.bool)
        match[rows, torch.from_numpy(candidate_of[lo:hi])] = True
        best = scores.masked_fill(~match, -torch.inf).amax(1, keepdim=True)
        yield ((scores >= best) & ~match).sum(1)
