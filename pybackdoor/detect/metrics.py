"""How well scores find what is known to be planted; pairs with equal scores share their places."""

from __future__ import annotations

import numpy as np


def auroc(scores: np.ndarray, truth: np.ndarray) -> float:
    """Probability that a planted pair scores above another one, ties counting half.

    Args:
        scores: [n] float, none NaN.
        truth: [n] bool, planted pairs.
    Raises:
        ValueError: all or none are planted, or a score is NaN.
    """
    scores, truth = _checked("auroc", scores, truth)
    planted = int(truth.sum())
    if planted in (0, len(truth)):
        raise ValueError(
            f"auroc: wanted pairs of both kinds, got {planted} planted among {len(truth)}"
        )
    _, level, count = np.unique(scores, return_inverse=True, return_counts=True)
    below = np.cumsum(count) - count  # of each level
    ranks = (below + (count + 1) / 2)[level]  # [n], from 1, ties at their mean
    wins = ranks[truth].sum() - planted * (planted + 1) / 2
    return float(wins / (planted * (len(truth) - planted)))


def hits(scores: np.ndarray, truth: np.ndarray, k: int) -> float:
    """Planted pairs expected among the k highest scores, ties broken at random.

    Args:
        scores, truth: as in ``auroc``.
        k: in [1, n].
    Raises:
        ValueError: k out of range, or a score is NaN.
    """
    scores, truth = _checked("hits", scores, truth)
    if not 1 <= k <= len(scores):
        raise ValueError(f"hits: k must be in [1, {len(scores)}], got {k}")
    last = np.partition(scores, len(scores) - k)[len(scores) - k]
    above, level = scores > last, scores == last
    places = k - int(above.sum())
    return float(truth[above].sum() + places * truth[level].sum() / level.sum())


def precision_at(scores: np.ndarray, truth: np.ndarray, k: int) -> float:
    """Share of planted pairs among the k highest scores."""
    return hits(scores, truth, k) / k


def recall_at(scores: np.ndarray, truth: np.ndarray, k: int) -> float:
    """Share of the planted pairs that is among the k highest scores."""
    found = hits(scores, truth, k)
    if not np.any(truth):
        raise ValueError("recall_at: wanted planted pairs, got none")
    return found / int(np.sum(truth))


def _checked(op: str, scores: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, truth = np.asarray(scores, np.float64), np.asarray(truth)
    if truth.dtype != bool or truth.shape != scores.shape or scores.ndim != 1:
        raise ValueError(
            f"{op}: truth must be [n] bool like scores {list(scores.shape)}, got {truth.dtype} "
            f"{list(truth.shape)}"
        )
    if np.isnan(scores).any():
        raise ValueError(f"{op}: scores must not be NaN: leave out the pairs that have none")
    return scores, truth
