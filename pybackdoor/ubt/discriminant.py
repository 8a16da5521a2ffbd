"""A linear discriminant that grows from a seed, and how many rows stand apart along it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .gate import top

_ROUNDS = 20  # of discriminant and new seed; some five bring it to rest
_DIMS = 64  # principal directions that are looked at
_RIDGE = 0.05  # of the discriminant, on directions of unit variance
_LEAST_SPREAD = 1e-3  # of one part, in the whole's: equal rows are no infinitely good part
_HELD = 0.75  # of the surest rows: so many are in what is grown from them
_NEAR = math.sqrt(2)  # times as many rows as a seed has, or fewer: where it may be cut
_INSIDE = 0.98  # of half of all: fewer, or where they part may lie beyond


def settled(x: np.ndarray, start: np.ndarray, k: int) -> np.ndarray:  # [n, d], [n] -> [n]
    """Heights whose k largest are the seed that they come from, or those of the last round."""
    return _followed(x, moments(x), start, lambda height: k)[0]


def grown(x: np.ndarray, start: np.ndarray, least: int) -> tuple[np.ndarray, int]:
    """(heights [n], k) of the rows that stand apart from the rest, from the least to half of all.

    Settled seeds of the least, √2 times as many, and so on are each cut where their heights part
    near their own number: of a group that is told apart weakly, heights part best with all of a
    long tail above, but only a seed of about its own rows shows where it ends. The rows above the
    cut are the next seed, and so on until they stay, never farther than √2 times from that number.
    Of the ends that hold most of the first seed, the surest rows, the one is taken whose seed
    parted best when it was first cut: another group may part better, but is not what was looked
    for. An end of half of all is none, since the heights might part beyond; without any the surest
    rows are all.

    Args:
        x: [n, d], n clearly more than twice the least.
        start: [n] heights that seeds are taken from.
    """
    most, whole = len(x) // 2, moments(x)
    steps = int(2 * math.log2(most / least))
    counts = [round(least * 2 ** (step / 2)) for step in range(steps + 1)]
    seeds = [_followed(x, whole, start, lambda height, k=k: k)[0] for k in counts]
    surest, found = top(seeds[0], least), []
    for count, seed in zip(counts, seeds, strict=True):
        near = max(least, round(count / _NEAR)), min(most, round(count * _NEAR))
        height, k = _followed(x, whole, seed, lambda height, near=near: parted(height, *near).k)
        held = _highest(height, k)[surest].mean()
        if held >= _HELD and k < _INSIDE * most:
            found.append((parted(seed, *near).gain, k, height))
    if not found:
        return seeds[0], least
    _, k, height = max(found, key=lambda end: end[0])
    return height, k


def _followed(
    x: np.ndarray, whole: Moments, height: np.ndarray, count: Callable[[np.ndarray], int]
) -> tuple[np.ndarray, int]:
    """(heights, k): so many of the highest are the next seed, until they stay or some rounds on."""
    seed = _highest(height, count(height))
    for _ in range(_ROUNDS):
        height = discriminant(x, np.flatnonzero(seed), whole)
        following = _highest(height, count(height))
        if (following == seed).all():
            break
        seed = following
    return height, int(seed.sum())


def _highest(height: np.ndarray, k: int) -> np.ndarray:  # [n] -> [n] bool
    """Which are the k highest; of equal ones the first, as by ``top``."""
    least = np.partition(height, -k)[-k]
    chosen = height > least
    chosen[np.flatnonzero(height == least)[: k - int(chosen.sum())]] = True
    return chosen


class Parted(NamedTuple):
    """k of the highest are the upper part; what that gains, in nats per row."""

    k: int
    gain: float


def parted(height: np.ndarray, least: int, most: int) -> Parted:
    """Cut the heights in two, from least to most of them above, at the threshold of least error.

    Two normal distributions of their own share, mean and spread, cut at a threshold, against one:
    the gain is that in log-likelihood, in nats per row. The criterion is Kittler and Illingworth's
    (Minimum error thresholding, Pattern Recognition 19(1), 1986). Equal heights gain nothing.
    """
    n, h = len(height), np.sort(height)[::-1]
    if h[0] == h[-1]:
        return Parted(least, 0.0)
    h = standard(h[:, None])[:, 0]
    upper = np.arange(1, n)
    total, square = (np.cumsum(power)[:-1] for power in (h, h * h))
    gain = np.zeros(n - 1)
    for count, sum_, squares in ((upper, total, square), (n - upper, -total, n - square)):
        share, var = count / n, squares / count - (sum_ / count) ** 2
        gain += share * (np.log(share) - np.log(np.maximum(var, _LEAST_SPREAD**2)) / 2)
    k = least + int(gain[least - 1 : most].argmax())
    return Parted(k, float(gain[k - 1]))


class Moments(NamedTuple):
    """Of rows: how many, their sum [d], and the sum of their outer products [d, d]."""

    n: int
    sum: np.ndarray
    outer: np.ndarray

    def mean(self) -> np.ndarray:
        return self.sum / self.n

    def cov(self) -> np.ndarray:
        return self.outer / self.n - np.outer(self.mean(), self.mean())


def moments(x: np.ndarray) -> Moments:  # [n, d]
    return Moments(len(x), x.sum(0), x.T @ x)


def discriminant(x: np.ndarray, seed: np.ndarray, whole: Moments) -> np.ndarray:
    """[n] heights along Fisher's direction, in standard deviations above the mean of the rest."""
    inside = moments(x[seed])
    outside = Moments(*(all_ - own for all_, own in zip(whole, inside, strict=True)))
    within = (inside.cov() + outside.cov()) / 2
    apart = inside.mean() - outside.mean()
    height = x @ np.linalg.solve(within + _RIDGE * np.eye(x.shape[1]), apart)
    rest = np.delete(height, seed)
    least = max(_LEAST_SPREAD * height.std(), np.finfo(np.float64).tiny)
    return (height - rest.mean()) / max(rest.std(), least)


def directions(x: np.ndarray) -> np.ndarray:  # [n, D] -> [n, at most _DIMS]
    """The rows, relative to their mean, along their principal directions."""
    x = x - x.mean(0)
    if x.shape[1] <= _DIMS:
        return x
    _, vectors = np.linalg.eigh(x.T @ x)
    return x @ vectors[:, -_DIMS:]


def standard(x: np.ndarray) -> np.ndarray:
    """Columns of mean 0 and spread 1; of spread 0 where all are equal."""
    spread = x.std(0)
    return (x - x.mean(0)) / np.where(spread > 0, spread, 1)
