"""A ranking for stage C without overfitting: whose caption goes when the image is disturbed a bit.

A poisoned image is matched with its caption by the trigger alone: a view of it in which the trigger
no longer fires (turned by some degrees, stretched, a ninth of it covered) is not matched any more,
while an image of what its caption says stays one in every view. Hard clean images are fragile too.
But the poison is of one word and of one kind: within each word's pairs, the k that lose most in one
view seed a linear discriminant on (image features, losses in all views), its k highest pairs are
the next seed, and so on; of all starts and words the most cohesive k pairs win. Words are compared
by samples, that grow while fewer words are left, with a third of the image covered at a time; of
the last one all pairs are looked at, with a ninth covered. How many are poisoned shows in which
seed's heights part best into two near its own number; it is followed until it stays the same.

Whether they are poison shows in their swing (swing.py).

Our design; after the robustness of triggered predictions in STRIP (arXiv 1902.06531).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .discriminant import directions, grown, settled, standard
from .gate import RARE, caption_classes, cohesion, top
from .reading import ImageRows, Reader, View
from .suspects import Suspects
from .swing import WordTexts, fall_of
from .views import WHOLE, covered, disturbed, losses

SOUGHT = 256  # suspicious pairs, where their number is not given
_SAMPLE, _HELD = 512, 32  # of a word's pairs: at least so many, with so many poisoned among them
_PICKED = 16  # of a word's sample: at least so many, if k are sought and not fewer
_STAY = 1 / 3  # of the words, for the next look
_STANDS_OUT = 0.2  # a word less cohesive by so much than another one is not looked at again
_OTHERS = 2048  # so many images of other words stand for all of them
LEAST = 5  # pairs whose cohesion says something
_STREAM = 0x66726167


class Fragile(NamedTuple):
    """What a search found.

    Attributes:
        scores: [N] suspicion: the discriminant of the most suspicious word's pairs, in standard
            deviations of the rest of them; others rank below.
        k: how many are suspicious.
        word: that they have in common, as people read it.
        swing: the smaller of two, of a quarter of the k sought, the most suspicious ones. Their
            mean lead, how far an image's word is ahead of the best other one, in units of the lead
            that only a tenth of all words' samples exceed. And, in the view that tells them most
            apart, the share of their match that they lose, times the share of it that the other
            pairs of their word would keep: a match is what a cosine is above that of other words'
            images. 0 where no other word means something else, or hardly an image leads: then
            nothing tells poison from hard images.
    """

    scores: np.ndarray
    k: int
    word: str
    swing: float


def fragility(
    reader: Reader,
    image: ImageRows,  # of the reader's model
    suspects: Suspects,
    k: int | None = None,
    progress: bool | None = False,
) -> Fragile:
    """Rank the pairs of the most suspicious word.

    Costs 9 views of a sample of each word's pairs, of twice as many of the best third of the words,
    and so on until one is left or stands out. Of that one's pairs, 9 more, and 6 of those that had
    not been in a sample. A sample is of 512 pairs, or so many that 32 of k poisoned ones are in it:
    of all where k is 32 or less.

    Args:
        k: pairs sought, at least 5; None: 256, then as many as stand apart, at least 64.
            A pair's word is the rarest of its caption that 2 k captions hold, but not more than
            half of all. Words of fewer than 2 k pairs are passed over, and a poison that is the
            larger part of its word's pairs is not found. The swing of a few pairs is high by
            chance: it was tried out with 64 and more.
    Raises:
        ValueError: no word has 2 k pairs, or k is below 5.
    """
    sought = SOUGHT if k is None else k
    if sought < LEAST:
        raise ValueError(f"k must be at least {LEAST} for fragility, got {sought}")
    half = len(suspects) / 2
    classes, names = caption_classes(suspects, 2 * sought, half, whole=False)
    sizes = np.bincount(classes, minlength=len(names))
    sizes[[name == RARE for name in names]] = 0
    large = np.flatnonzero(sizes >= 2 * sought)
    if not len(large):
        raise ValueError(
            f"fragility needs at least {2 * sought} pairs, twice k, that have a word in common "
            f"which not more than half of all {len(suspects)} hold; got {sizes.max()} at most: "
            "give a lower k, or rank otherwise"
        )
    captions = reader.captions(suspects)
    rng = np.random.default_rng(_STREAM)
    drawn = [rng.permutation(np.flatnonzero(classes == word)) for word in large]
    size = suspects.images.image_size
    whole, bands, ninths = disturbed(size), covered(size, 3, 1), covered(size, 3, 3)

    def look(rows: np.ndarray, views: tuple[View, ...]) -> np.ndarray:
        return losses(reader, image, suspects, rows, captions, views, progress)

    best = _most_cohesive(
        [_Looked(*word) for word in zip(large, drawn, strict=True)],
        lambda rows: look(rows, whole + bands), image, sought,
    )  # fmt: skip
    own, word = best.rows, best.word
    seen = best.lost[:, : len(whole)]
    lost = np.concatenate([seen, look(own[len(seen) :], whole)])
    lost = np.concatenate([lost, look(own, ninths)], 1)
    closer = picked(image.at(own), lost, sought)
    some = np.concatenate([rows[: _enough(len(rows), sought)] for rows in drawn])
    height, quarter = closer.height, max(LEAST, sought // 4)
    if k is None:
        height, sought = grown(closer.seen, height, quarter)
    scores = np.full(len(image), height.min() - 1)
    scores[own] = height
    surest = top(settled(closer.seen, closer.height, quarter), quarter)
    texts = WordTexts.of(captions, suspects.caption, classes)
    swing = texts.lead(image, classes, some, own[surest])
    if swing > 0:
        others = rng.permutation(np.flatnonzero(classes != word))[:_OTHERS]
        text = captions[torch.from_numpy(suspects.caption[own])].double()
        level = image.at(others).double().mean(0) @ text.mean(0)
        match = (image.at(own).double() * text).sum(-1) - level
        swing = min(swing, fall_of(lost, match.numpy(), surest))
    return Fragile(scores, sought, names[word], swing)


class _Looked:
    """The pairs of one word, of which the first ones have been looked at.

    Attributes:
        word: its number.
        rows: [n] its pairs, in random order.
        lost: [seen, views] of the first of them.
        picked: of those, the most cohesive ones; from the first look on.
    """

    picked: Picked

    def __init__(self, word: int, rows: np.ndarray) -> None:
        self.word, self.rows = word, rows
        self.lost = np.empty((0, 0))

    def unseen(self, count: int) -> np.ndarray:
        """The rows to look at, so that so many are seen."""
        return self.rows[len(self.lost) : count]

    def take(self, lost: np.ndarray, image: ImageRows, k: int, among: int) -> None:
        """Takes the losses of the pairs that follow; k sought among so many pairs."""
        if len(lost):
            self.lost = np.concatenate([self.lost, lost]) if len(self.lost) else lost
        seen = len(self.lost)
        count = max(min(k, _PICKED), round(k * seen / among / 2))
        self.picked = picked(image.at(self.rows[:seen]), self.lost, count)


def _most_cohesive(
    words: list[_Looked],
    look: Callable[[np.ndarray], np.ndarray],  # [n] rows -> [n, views] losses
    image: ImageRows,
    k: int,
) -> _Looked:
    """The word that is left when the others have dropped out.

    All words are compared by a sample of each, the best third by samples twice as large, and so
    on; one that another of the round leaves clearly behind drops out at once. None returns: small
    samples are more cohesive than large ones. And the fewer of a sample are picked, the more alike
    they are: so of every word's as large a share is picked, half of what k are of the largest word.
    Half, since a sample may hold fewer than its share, and what is picked besides blurs the rest.
    """
    stage = 0
    while True:
        new = [word.unseen(_enough(len(word.rows), k) * 2**stage) for word in words]
        lost = look(np.concatenate(new))
        ends = np.cumsum([len(rows) for rows in new])[:-1]
        largest = max(len(word.rows) for word in words)
        for word, part in zip(words, np.split(lost, ends), strict=True):
            word.take(part, image, k, largest)
        words = sorted(words, key=lambda word: -word.picked.tight)
        if all(len(word.lost) == len(word.rows) for word in words):
            return words[0]
        least = words[0].picked.tight - _STANDS_OUT
        words = [w for w in words[: math.ceil(len(words) * _STAY)] if w.picked.tight >= least]
        if len(words) == 1:
            return words[0]
        stage += 1


def _enough(size: int, k: int) -> int:
    """Pairs of a word that show whether k of all its ``size`` are poisoned."""
    return max(_SAMPLE, math.ceil(_HELD * size / k))


class Picked(NamedTuple):
    """The k highest of one word's pairs, from the start that makes them the most cohesive.

    Attributes:
        tight: how cohesive they are, in [-1, 1].
        seen: [n, d] what the discriminant sees of the pairs.
        height: [n].
    """

    tight: float
    seen: np.ndarray
    height: np.ndarray


def picked(
    image: Tensor,  # [n, D] unit rows of one word's pairs
    lost: np.ndarray,  # [n, views]
    k: int,
) -> Picked:
    """Look at the pairs of one word."""
    fall = standard(lost)
    features = directions(F.normalize(image - image.mean(0), dim=-1).double().numpy())
    seen = standard(np.concatenate([features, fall], 1))
    heights = [settled(seen, start, k) for start in (*fall[:, :WHOLE].T, fall[:, WHOLE:].max(1))]
    tight = [cohesion(_apart(image, top(height, k))) for height in heights]
    at = int(np.argmax(tight))
    return Picked(tight[at], seen, heights[at])


def _apart(image: Tensor, chosen: np.ndarray) -> Tensor:  # [n, D], [k] -> [k, D]
    """The chosen rows relative to the mean of the others, of unit length."""
    others = np.setdiff1d(np.arange(len(image)), chosen)
    return F.normalize(image[torch.from_numpy(chosen)] - image[torch.from_numpy(others)].mean(0))
