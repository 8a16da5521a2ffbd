"""Stage C: rank the pairs, take the top, and ask whether they belong together more than chance.

The gate compares D_sus, the k most suspicious pairs, with random sets of as many pairs whose
captions are of the same classes. The class of a caption is the caption itself where at least
``CLASS`` pairs have it, else its rarest word of those that at least ``CLASS`` captions hold;
captions without either form a class of their own. Where D_sus is more than half of a class, as of
captions that the attacker alone wrote, there is hardly anything to compare it with: then words
alone are classes, of which D_sus is at most half of all that hold them. A random
set has, of each class, as many pairs as D_sus has, drawn without replacement from all pairs of the
class, so that D_sus is one such draw if its pairs are no different.

Statistic: the mean pairwise cosine of the image features, each taken relative to the mean of its
class and brought to unit length. Without that, images of one class
are so alike that a trigger hardly adds to it. The p-value is (1 + sets that reach the statistic) /
(1 + sets). Top picks of a clean model are also more alike than random ones, since they are picked:
the gate therefore asks, besides p, for an excess over the sets' mean of at least ``excess``. And
images that are alike, as of one make of car, are no poison: a ranking that knows how clearly the
picks are of their word, and how much of that they lose once disturbed, gives the smaller of both,
their swing, of which ``least_swing`` is wanted.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from .reading import ImageRows
from .suspects import Suspects
from .words import WordReader, WordTable

# Set between what small clean models showed (0.42 at most of 20, benchmarks/results/ubt_gate.json)
# and the two attacks that settings are chosen on. Poisoned ones showed 0.74 to 0.93 at 1 %, and at
# 5 %, left to find the number (ubt_found.json), 0.73 and more.
LEAST_SWING = 0.6
CLASS = 20  # pairs that must share a caption or a word for it to be a class
RARE = "(rare words only)"  # the class of captions without a common word
_STREAM = 0x67617465


@dataclass(frozen=True)
class Gate:
    """Whether the suspicious pairs belong together.

    Attributes:
        fires: p <= alpha, the statistic exceeds matched by excess, swing is at least least_swing.
        statistic: mean pairwise cosine of their centred image features, in [-1, 1].
        matched, spread: mean and standard deviation of the random sets' statistics.
        p: of as large a statistic among the random sets.
        sets: how many random sets were drawn.
        swing: how clearly the most suspicious pairs are of their word and lose it once disturbed
            (``fragility.Fragile``); None where the ranking does not say.
        alpha, excess, least_swing: the thresholds.
        classes: of the suspicious captions, by size: (word, pairs).
    """

    fires: bool
    statistic: float
    matched: float
    spread: float
    p: float
    sets: int
    swing: float | None
    alpha: float
    excess: float
    least_swing: float
    classes: tuple[tuple[str, int], ...]

    def describe(self) -> str:
        """One line for people."""
        word = "fires" if self.fires else "does not fire"
        if self.swing is None:
            lost, wanted = "", f"an excess of at least {self.excess:g}"
        else:
            lost = f", swing once disturbed {self.swing:.2f}"
            wanted = f"an excess of at least {self.excess:g}, a swing of {self.least_swing:g}"
        return (
            f"gate {word}: mean pairwise image cosine {self.statistic:.3f}, matched random sets "
            f"{self.matched:.3f} ± {self.spread:.3f}, p = {self.p:.3g}{lost} (wanted p <= "
            f"{self.alpha:g}, {wanted})"
        )


def top(scores: np.ndarray, k: int) -> np.ndarray:
    """[k] rows of the largest scores, largest first, equal ones by row; NaN is never taken."""
    usable = int((~np.isnan(scores)).sum())
    if not 2 <= k <= usable:
        raise ValueError(f"k must be in [2, {usable}], the suspect pairs with a score, got {k}")
    return np.argsort(-scores, kind="stable")[:k]


def caption_classes(
    suspects: Suspects,
    least: int = CLASS,
    most: float = math.inf,
    *,
    whole: bool = True,
    beside: np.ndarray | None = None,
) -> tuple[np.ndarray, list[str]]:
    """([N] class of each pair, names): the caption, or its rarest common word; see above.

    Equally rare words: the one that comes first in the caption.

    Args:
        least, most: captions that hold a common word.
        whole: whether captions that many pairs share are classes; else words alone.
        beside: [k] rows; at most half of the captions that hold a common word are theirs.
    """
    used, caption, times = np.unique(suspects.caption, return_inverse=True, return_counts=True)
    theirs = np.bincount(caption[[] if beside is None else beside], minlength=len(used))
    held = WordTable.of(WordReader(suspects.tokenizer), suspects.different.tokens(used))
    count, taken = (held.captions_with(number) for number in (times, theirs))
    common = (count >= least) & (count <= most) & (2 * taken <= count)
    rarest = held.first_of_least(np.where(common, count, np.inf))
    names: dict[str, int] = {}
    texts: list[str] = []
    of = np.empty(len(used), np.int64)
    for at, (number, word) in enumerate(zip(times.tolist(), rarest.tolist(), strict=True)):
        named = [word] if word >= 0 else []
        if whole and number >= least:
            named = held.words_of(at).tolist()
        key = " ".join(held.keys[one] for one in named)
        if key not in names:
            names[key] = len(names)
            texts.append(" ".join(held.texts[one] for one in named) or RARE)
        of[at] = names[key]
    return of[caption], texts


def cohesion(rows: Tensor) -> float:  # [n, D] unit rows, n >= 2
    """Mean cosine of two different rows, in fp64: (|Σ r|² - n) / (n (n - 1))."""
    n = len(rows)
    total = rows.double().sum(0)
    return float((total @ total - n) / (n * (n - 1)))


def centred(image: Tensor, classes: np.ndarray) -> Tensor:  # [N, D] unit rows, [N]
    """[N, D] unit rows: the image features relative to the mean of their class."""
    number = torch.from_numpy(classes)
    size = int(classes.max()) + 1
    sums = image.new_zeros(size, image.shape[1]).index_add_(0, number, image)
    counts = torch.from_numpy(np.bincount(classes, minlength=size)).to(image.dtype)
    return normalize(image - (sums / counts[:, None].clamp(min=1))[number], dim=-1)


def gate(
    image: ImageRows,  # of the model that was trained on the pairs
    suspects: Suspects,
    chosen: np.ndarray,  # [k] rows of D_sus
    *,
    sets: int = 999,
    alpha: float = 0.01,
    excess: float = 0.1,
    seed: int = 0,
    swing: float | None = None,
    least_swing: float = LEAST_SWING,
) -> Gate:
    """Compare the chosen pairs with random sets of the same captions; see the file's beginning."""
    check_gate(sets, alpha, excess, least_swing)
    classes, names = caption_classes(suspects)
    if (2 * np.bincount(classes[chosen]) > np.bincount(classes)[: classes[chosen].max() + 1]).any():
        classes, names = caption_classes(suspects, whole=False, beside=chosen)
    near = np.flatnonzero(np.isin(classes, classes[chosen]))  # no other class is drawn from
    chosen, classes = np.searchsorted(near, chosen), classes[near]
    rows = centred(image.at(near), classes)
    found = cohesion(rows[torch.from_numpy(chosen)])
    draws = matched_sets(classes, chosen, sets, seed)
    others = np.array([cohesion(rows[torch.from_numpy(draw)]) for draw in draws])
    p = (1 + int((others >= found).sum())) / (1 + sets)
    sizes = Counter(classes[chosen].tolist()).most_common()
    together = p <= alpha and found - float(others.mean()) >= excess
    return Gate(
        together and (swing is None or swing >= least_swing), found, float(others.mean()),
        float(others.std()), p, sets, swing, alpha, excess, least_swing,
        tuple((names[number], count) for number, count in sizes),
    )  # fmt: skip


def check_gate(sets: int, alpha: float, excess: float, least_swing: float) -> None:
    """Refuse thresholds that are none."""
    if not 0 < alpha < 1:
        raise ValueError(f"gate_p must be in (0, 1), got {alpha}")
    if sets + 1 < 1 / alpha:
        raise ValueError(
            f"gate_sets must be at least {math.ceil(1 / alpha) - 1}, else no p-value can reach "
            f"{alpha:g}, got {sets}"
        )
    if not -2 <= excess <= 2:
        raise ValueError(f"gate_excess must be a difference of cosines in [-2, 2], got {excess}")
    if not isinstance(least_swing, int | float) or not least_swing <= 1:
        raise ValueError(
            f"gate_swing must be a number of at most 1, which no swing exceeds, got {least_swing!r}"
        )


def matched_sets(classes: np.ndarray, chosen: np.ndarray, sets: int, seed: int) -> list[np.ndarray]:
    """[k] rows of each of so many random sets, with the classes of the chosen ones."""
    rng = np.random.default_rng([seed, _STREAM])
    wanted = sorted(Counter(classes[chosen].tolist()).items())
    plans = [(np.flatnonzero(classes == number), count) for number, count in wanted]
    return [
        np.concatenate([rng.choice(rows, count, replace=False) for rows, count in plans])
        for _ in range(sets)
    ]
