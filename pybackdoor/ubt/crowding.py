"""A ranking for stage C that needs no overfitting: where images of one word crowd together.

Poisoned images share a trigger; relative to the mean of the images whose captions hold the same
word, a model that has learnt the trigger puts them close together. The poison must be the lesser
part of its word's pairs, else the mean is its own. Our design, in the spirit of spectral signatures
(arXiv 1811.00636).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .gate import caption_classes, centred, cohesion
from .suspects import Suspects

_NEAR = 64  # neighbours that tell how crowded it is around an image
_ROUNDS = 10  # of moving the centre to the mean of its k nearest
_CHUNK = 2048


def crowding(image: Tensor, suspects: Suspects, k: int) -> np.ndarray:
    """[N] suspicion: cosine with the centre of the tightest crowd of k pairs that share a word.

    In each word's class the centre starts at the image whose 64 nearest (at most k) are nearest,
    and moves to the mean of its k nearest. The class with the most cohesive crowd is ranked by the
    cosine with its centre; all other pairs get -1. Costs n² D for a class of n pairs.

    Args:
        image: [N, D] unit rows, by the model that was trained on the pairs.
        k: pairs of the crowd; classes of fewer than 2 k pairs are passed over.
    Raises:
        ValueError: no class has 2 k pairs.
    """
    classes, _ = caption_classes(suspects, whole=False)
    rows = centred(image, classes, np.empty(0, np.int64))
    best, scores = -1.0, np.full(len(image), -1.0)
    large = np.flatnonzero(np.bincount(classes) >= 2 * k)
    if not len(large):
        raise ValueError(
            f"crowding needs a word in the captions of at least {2 * k} pairs, twice k; got "
            f"{np.bincount(classes).max()} at most: lower k, or rank by 'gain'"
        )
    for number in large:
        members = np.flatnonzero(classes == number)
        own = rows[torch.from_numpy(members)]
        centre = own[int(_density(own, min(k, _NEAR)).argmax())]
        for _ in range(_ROUNDS):
            crowd = own[(own @ centre).topk(k).indices]
            centre = torch.nn.functional.normalize(crowd.mean(0), dim=0)
        found = cohesion(crowd)
        if found > best:
            best = found
            scores = np.full(len(image), -1.0)
            scores[members] = (own @ centre).double().numpy()
    return scores


def _density(rows: Tensor, near: int) -> Tensor:  # [n, D] unit rows
    """[n] mean cosine of each row with so many nearest ones, itself among them."""
    parts = [(part @ rows.T).topk(near).values.mean(1) for part in rows.split(_CHUNK)]
    return torch.cat(parts)
