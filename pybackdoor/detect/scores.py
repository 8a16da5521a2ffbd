"""The formulas: from neighbours or cosines to one score per pair, higher = more suspicious.

k-dist, SLOF, LID and DAO as in arXiv 2502.01385, d_(1) <= d_(2) <= ... the distances of a pair's
image to its nearest others. Where a formula gives NaN or +inf the score is 1000, where it gives
-inf it is 0: so does that paper. An image with more than k exact copies gives 0/0, so copies come
first; look at the picture before calling them poison.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ubt.fragility import fragility
from .neighbours import Neighbours

UNDEFINED = 1000.0  # the score of NaN and +inf
_ONE_LOG = 1e-4  # keeps log(d_(j)/d_(k) + 1e-4) finite at d_(j) = 0
_TOLERANCE, _ROUNDS = 1e-12, 2000  # of the mixture's mean log-likelihood


def k_distance(neighbours: Neighbours) -> np.ndarray:
    """[n] float64: the distance to the k-th neighbour."""
    return _defined(neighbours.distances[:, -1].copy())


def slof(neighbours: Neighbours) -> np.ndarray:
    """[n] float64: simplified local outlier factor, the mean over the k nearest j of
    d_(k)(i)/d_(k)(j)."""
    furthest = neighbours.distances[:, -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return _defined((furthest[:, None] / furthest[neighbours.rows]).mean(1))


def lid(neighbours: Neighbours) -> np.ndarray:
    """[n] float64: local intrinsic dimensionality, -k / Σ_j log(d_(j)/d_(k) + 1e-4).

    Of neighbours that are all equally far the sum is just above 0 and the score far below it: so
    the published formula has it.
    """
    return _defined(_lid(neighbours))


def dao(neighbours: Neighbours) -> np.ndarray:
    """[n] float64: dimensionality-aware outlier detection, the mean over the k nearest j of
    LID(j)·log(d_(k)(i)/d_(k)(j))."""
    furthest = neighbours.distances[:, -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log(furthest[:, None] / furthest[neighbours.rows])
        return _defined((_lid(neighbours)[neighbours.rows] * ratio).mean(1))


def low_cosine(cosines: np.ndarray) -> np.ndarray:
    """[n] float64: minus the cosine of image and caption."""
    return -cosines


def high_cosine(cosines: np.ndarray) -> np.ndarray:
    """[n] float64: the cosine of image and caption."""
    return cosines.copy()


def low_component(cosines: np.ndarray) -> np.ndarray:
    """[n] float64 in [0, 1]: the probability that a pair's cosine is of the lower of two normal
    components (SafeCLIP, arXiv 2310.05862; its safe set is a score of at most 0.1).

    A wide lower component also claims cosines far above the upper one.
    """
    return fit_mixture(cosines).lower(cosines)


def similarity_gain(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """[n] float64: cosine of image and caption after a short overfit, minus that before it."""
    return after - before


@dataclass(frozen=True)
class Mixture:
    """Two normal components, the one with the lower mean first.

    Attributes:
        weights, means, variances: [2] float64.
        log_likelihood: mean over the values it was fitted to.
    """

    weights: np.ndarray
    means: np.ndarray
    variances: np.ndarray
    log_likelihood: float

    def lower(self, values: np.ndarray) -> np.ndarray:
        """[n] posterior probability of the component with the lower mean."""
        return _posterior(values, self.weights, self.means, self.variances)[0][:, 0]


def fit_mixture(values: np.ndarray) -> Mixture:  # [n]
    """Fit two normal components by expectation maximisation, from the halves around the mid-range.

    Raises:
        ValueError: fewer than two different values.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2 or values.min() == values.max():
        raise ValueError(
            f"gmm: the cosines must hold at least two different values, got {len(values)} "
            f"that are all equal"
        )
    floor = 1e-6 * values.var()  # no component shrinks onto a single value
    upper = values > (values.min() + values.max()) / 2
    share = np.stack([~upper, upper], 1).astype(np.float64)  # [n, 2]
    before = -np.inf
    for _ in range(_ROUNDS):
        total = share.sum(0)
        weights, means = total / len(values), (share * values[:, None]).sum(0) / total
        variances = (share * (values[:, None] - means) ** 2).sum(0) / total + floor
        share, log_likelihood = _posterior(values, weights, means, variances)
        if log_likelihood - before < _TOLERANCE:
            break
        before = log_likelihood
    order = np.argsort(means, kind="stable")
    return Mixture(weights[order], means[order], variances[order], log_likelihood)


def _posterior(
    values: np.ndarray, weights: np.ndarray, means: np.ndarray, variances: np.ndarray
) -> tuple[np.ndarray, float]:
    """([n, 2] responsibilities, mean log-likelihood)."""
    with np.errstate(divide="ignore"):
        logs = np.log(weights) - 0.5 * (
            np.log(2 * np.pi * variances) + (values[:, None] - means) ** 2 / variances
        )
    total = np.logaddexp(logs[:, 0], logs[:, 1])
    return np.exp(logs - total[:, None]), float(total.mean())


def _lid(neighbours: Neighbours) -> np.ndarray:
    distances = neighbours.distances
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(distances / distances[:, -1:] + _ONE_LOG)
        return -distances.shape[1] / logs.sum(1)


def _defined(scores: np.ndarray) -> np.ndarray:
    return np.nan_to_num(scores, copy=False, nan=UNDEFINED, posinf=UNDEFINED, neginf=0.0)


@dataclass(frozen=True)
class Method:
    """A way to score pairs.

    Attributes:
        function: the formula; of "views", what encodes them and finds the suspicious word too.
        takes: "neighbours" of the images, "cosines" of the pairs, cosines of "two models", or
            "views" of the images beside their captions.
        about: one line for people.
    """

    function: Callable[..., Any]
    takes: str
    about: str


METHODS = {
    "dao": Method(dao, "neighbours", "outlier of its neighbourhood, dimension taken into account"),
    "slof": Method(slof, "neighbours", "further from its neighbours than they are from theirs"),
    "lid": Method(lid, "neighbours", "dimensionality of the image's neighbourhood"),
    "k_dist": Method(k_distance, "neighbours", "distance to the k-th nearest image"),
    "gmm": Method(low_component, "cosines", "image and caption agree little: lower of two groups"),
    "low_cosine": Method(low_cosine, "cosines", "image and caption agree least"),
    "high_cosine": Method(high_cosine, "cosines", "image and caption agree best"),
    "gain": Method(similarity_gain, "two models", "agreement gained by a short overfit"),
    "fragility": Method(fragility, "views", "one word's pairs that agree until disturbed a bit"),
}


def method_named(name: Any) -> Method:
    """A method of the table.

    Raises:
        ValueError: there is none of this name; the nearest is offered.
    """
    if name in METHODS:
        return METHODS[name]
    close = difflib.get_close_matches(str(name), METHODS, 1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}{hint}")
