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


def settled(x: np.ndarray, start: np.ndarray, k: int) -> np.ndarray:  # [n, d], [n] -> [n]
    """Heights whose k largest are the seed that they come from, or those of the last round."""
    return _followed(x, start, lambda height: k)[0]


def grown(x: np.ndarray, start: np.ndarray, least: int) -> tuple[np.ndarray, int]:
    """(heights [n], k) of the rows that stand apart from the rest, from the least to half of all.

    Settled seeds of the least, √2 times as many, and so on are tried; from the one whose heights
    part best, the rows above the threshold are the next seed, until they stay.

    Args:
        x: [n, d].
        start: [n] heights that seeds are taken from.
    """
    most = len(x) // 2
    steps = int(2 * math.log2(most / least))
    seeds = (settled(x, start, round(least * 2 ** (step / 2))) for step in range(steps + 1))
    best = max(seeds, key=lambda height: parted(height, least, most).gain)
    return _followed(x, best, lambda height: parted(height, least, most).k)


def _followed(
    x: np.ndarray, height: np.ndarray, count: Callable[[np.ndarray], int]
) -> tuple[np.ndarray, int]:
    """(heights, k): so many of the highest are the next seed, until they stay the same."""
    whole, seed = moments(x), top(height, count(height))
    for _ in range(_ROUNDS):
        height = discriminant(x, seed, whole)
        following = top(height, count(height))
        if set(following) == set(seed):
            break
        seed = following
    return height, len(seed)


class Parted(NamedTuple):
    """k of the highest are the upper part; what that gains, in nats per row."""

    k: int
    gain: float


def parted(height: np.ndarray, least: int, most: int) -> Parted:
    """Cut the heights in two, from least to most of them above, at the threshold of least error.

    Two normal distributions of their own share, mean and spread, cut at a threshold, against one:
    the gain is that in log-likelihood, in nats per row. The criterion is Kittler and Illingworth's
    (Minimum error thresholding, Pattern Recognition 19(1), 1986).
    """
    n, h = len(height), np.sort(height)[::-1]
    h = h - h.mean()
    upper = np.arange(1, n)
    total, square = (np.cumsum(power)[:-1] for power in (h, h * h))
    spread = max(h.var(), np.finfo(np.float64).tiny)
    parts = ((upper, total, square), (n - upper, -total, n * spread - square))
    gain = np.zeros(n - 1)
    for count, sum_, squares in parts:
        share, var = count / n, squares / count - (sum_ / count) ** 2
        var = np.maximum(var, _LEAST_SPREAD**2 * spread)
        gain += share * (np.log(share) + np.log(spread / var) / 2)
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
    return (height - rest.mean()) / max(rest.std(), np.finfo(np.float64).tiny)


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
