"""Whether suspicious pairs of one word are poison: how clearly they are of it, and lose it.

Hard clean images lose a word that was hardly ahead of another one, or in a view that few images of
their word bear; poison is of its word as clearly as the clearest images, and loses it where they
keep it. Our design.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .reading import ImageRows

_CLEAR = 0.9  # quantile of leads
_CHUNK = 4096  # rows at a time
_SAME_WORD = 0.9  # cosine, relative to all words' mean, from which two are no rivals


def fall_of(lost: np.ndarray, match: np.ndarray, chosen: np.ndarray) -> float:
    """How much more of their match the chosen ones lose than the others keep losing, in [0, 1].

    The share of it that the chosen ones lose, times the share that the others keep, in the view
    where that is most.

    Args:
        lost: [n, views] the cosine that each pair of a word loses in each view.
        match: [n] its cosine above that of other words' images. 0 or less for the chosen: 0.
        chosen: [k] rows.
    """
    inside = np.zeros(len(lost), bool)
    inside[chosen] = True
    whole = match[inside].mean()
    if whole <= 0:
        return 0.0
    own, others = (np.clip(lost[rows].mean(0) / whole, 0, 1) for rows in (inside, ~inside))
    return float((own * (1 - others)).max())


@dataclass(frozen=True)
class WordTexts:
    """What images are told apart by: the words that captions are sorted by.

    Attributes:
        text: [W, D] unit rows, the mean caption of each word's pairs.
        rival: [W, W] bool, whether a word (column) means something else than the other (row).
    """

    text: Tensor
    rival: Tensor

    @staticmethod
    def of(captions: Tensor, caption: np.ndarray, classes: np.ndarray) -> WordTexts:
        """Of U different captions [U, D], each pair's own [N] and its word [N]."""
        both, times = np.unique(np.stack([classes, caption]), axis=1, return_counts=True)
        parts = (torch.from_numpy(x).split(_CHUNK) for x in (*both, times))
        sums = captions.new_zeros(int(classes.max()) + 1, captions.shape[1], dtype=torch.float64)
        for word, used, count in zip(*parts, strict=True):
            sums.index_add_(0, word, captions[used].double() * count[:, None])
        text = F.normalize(sums, dim=-1)
        apart = F.normalize(text - text.mean(0), dim=-1)  # texts of one model are all alike
        rival = (apart @ apart.T < _SAME_WORD).fill_diagonal_(False)
        return WordTexts(text.to(captions.dtype), rival)

    def leads(self, image: Tensor, own: np.ndarray) -> Tensor:  # [n, D], [n] -> [n]
        """How far an image's own word is ahead of the best rival; without a rival of 0."""
        parts = zip(image.split(_CHUNK), torch.from_numpy(own).split(_CHUNK), strict=True)
        return torch.cat([self._leads(*part) for part in parts])

    def _leads(self, image: Tensor, word: Tensor) -> Tensor:
        cosine = image @ self.text.T
        own = cosine.gather(1, word[:, None])[:, 0]
        best = cosine.masked_fill_(~self.rival[word], -math.inf).max(1).values
        return own - best.masked_fill(best.isinf(), 0.0)

    def lead(
        self,
        image: ImageRows,
        classes: np.ndarray,  # [N] each pair's word
        sample: np.ndarray,  # [n] rows, of all words
        chosen: np.ndarray,  # [k] rows, of one word
    ) -> float:
        """The chosen images' mean lead, in units of the lead that few of the sample exceed.

        0: no other word means something else, or hardly an image of the sample leads.
        """
        clear = float(self.leads(image.at(sample), classes[sample]).quantile(_CLEAR))
        if clear <= 0 or not self.rival[classes[chosen[0]]].any():
            return 0.0
        return float(self.leads(image.at(chosen), classes[chosen]).mean()) / clear
