"""The formulas against plain loops, the mixture and the figures against definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pybackdoor.detect import METHODS, auroc, metrics, nearest, precision_at, recall_at
from pybackdoor.detect.neighbours import Neighbours
from pybackdoor.detect.scores import fit_mixture, method_named

K = 5
FEATURES = torch.randn(60, 4, generator=torch.Generator().manual_seed(3))
NEAR = nearest(FEATURES, K)


def lid_of(i: int) -> float:
    d = NEAR.distances[i].tolist()
    return -K / sum(math.log(d[j] / d[-1] + 1e-4) for j in range(K))


def mean_over_neighbours(i: int, term) -> float:
    return sum(term(int(j)) for j in NEAR.rows[i]) / K


def d_k(i: int) -> float:
    return float(NEAR.distances[i, -1])


FORMULAS = {
    "k_dist": d_k,
    "slof": lambda i: mean_over_neighbours(i, lambda j: d_k(i) / d_k(j)),
    "lid": lid_of,
    "dao": lambda i: mean_over_neighbours(i, lambda j: lid_of(j) * math.log(d_k(i) / d_k(j))),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name):
    found = METHODS[name].function(NEAR)
    assert found.dtype == np.float64
    wanted = [FORMULAS[name](i) for i in range(60)]
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-13)


def test_what_is_undefined_gets_the_published_values():
    """Rows 0-3 are copies; row 4 has them as neighbours; rows 5-8 are two such pairs."""
    features = torch.tensor([[0.0], [0.0], [0.0], [0.0], [1.0], [9.0], [9.5], [10.5], [20.0]])
    near = nearest(features, 3)
    before = near.distances.copy()
    found = {name: METHODS[name].function(near) for name in FORMULAS}
    assert (found["lid"][:4] == 1000).all()  # 0/0
    assert (found["slof"][:4] == 1000).all() and (found["dao"][:4] == 1000).all()
    assert found["slof"][4] == 1000  # 1/0
    assert found["k_dist"][:4].tolist() == [0] * 4
    assert all(np.isfinite(scores).all() for scores in found.values())
    assert np.array_equal(near.distances, before)
    zero_sum = Neighbours(np.array([[1 - 1e-4, 1.0]]), np.zeros((1, 2), np.int64))
    logs = math.log(1 - 1e-4 + 1e-4) + math.log(1 + 1e-4)
    assert METHODS["lid"].function(zero_sum)[0] == pytest.approx(-2 / logs, rel=1e-9)
    flat = Neighbours(np.ones((1, 3)), np.zeros((1, 3), np.int64))
    assert METHODS["lid"].function(flat)[0] == pytest.approx(-1 / math.log1p(1e-4))


def test_minus_infinity_is_zero():
    """A row on top of its neighbours, none of which is: log(0/d) = -inf."""
    near = Neighbours(np.array([[0.0, 0.0], [1.0, 2.0], [1.0, 3.0]]), np.array([[1, 2]] * 3))
    assert METHODS["dao"].function(near)[0] == 0
    assert METHODS["slof"].function(near)[0] == 0


def test_cosines_rank_from_either_end():
    cosines = np.array([0.1, 0.5, -0.2])
    assert METHODS["low_cosine"].function(cosines).tolist() == [-0.1, -0.5, 0.2]
    assert METHODS["high_cosine"].function(cosines).tolist() == [0.1, 0.5, -0.2]
    gain = METHODS["gain"].function(cosines, np.array([0.4, 0.5, 0.0]))
    np.testing.assert_allclose(gain, [0.3, 0, 0.2], rtol=1e-12)


def normal(x: float, mean: float, variance: float) -> float:
    return math.exp(-((x - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)


@pytest.mark.parametrize("share, low, high", [(0.3, (0.1, 0.05), (0.4, 0.08)),
                                              (0.01, (-0.2, 0.03), (0.3, 0.05))])  # fmt: skip
def test_mixture_is_found_and_scores_are_its_posterior(share, low, high):
    rng = np.random.default_rng(0)
    n, poisoned = 20000, round(20000 * share)
    values = np.concatenate([rng.normal(*low, poisoned), rng.normal(*high, n - poisoned)])
    found = fit_mixture(values)
    np.testing.assert_allclose(found.weights, [share, 1 - share], atol=0.01)
    np.testing.assert_allclose(found.means, [low[0], high[0]], atol=0.01)
    np.testing.assert_allclose(np.sqrt(found.variances), [low[1], high[1]], rtol=0.1)
    true = [share * normal(x, low[0], low[1] ** 2) + (1 - share) * normal(x, high[0], high[1] ** 2)
            for x in values.tolist()]  # fmt: skip
    assert found.log_likelihood >= np.log(true).mean()  # no worse than what made the values
    scores = METHODS["gmm"].function(values)
    for i in (0, 5, 100, n - 1, n - 7):
        parts = zip(found.weights, found.means, found.variances, strict=True)
        a, b = (weight * normal(values[i], mean, variance) for weight, mean, variance in parts)
        assert scores[i] == pytest.approx(a / (a + b), rel=1e-9, abs=1e-12)
    # A stationary point: each component is the weighted mean and variance of the values.
    for share_of, mean, variance in zip((scores, 1 - scores), found.means, found.variances,
                                        strict=True):  # fmt: skip
        assert (share_of * values).sum() / share_of.sum() == pytest.approx(mean, abs=1e-5)
        spread = (share_of * (values - mean) ** 2).sum() / share_of.sum()
        assert spread == pytest.approx(variance, rel=1e-3)


def test_mixture_of_few_values():
    assert fit_mixture(np.array([0.0, 1.0])).means.tolist() == [0, 1]
    for values in ([], [0.5], [0.5, 0.5]):
        with pytest.raises(ValueError, match="at least two different values"):
            fit_mixture(np.array(values))


def test_unknown_method_is_refused_with_the_nearest():
    assert method_named("lid") is METHODS["lid"]
    with pytest.raises(ValueError, match="one of dao, slof.*got 'kdist' .did you mean 'k_dist'"):
        method_named("kdist")
    with pytest.raises(ValueError, match=r"got 3$"):
        method_named(3)


SCORED = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40)


@settings(deadline=None, max_examples=100)
@given(SCORED)
def test_auroc_is_the_share_of_pairs_in_order(pairs):
    scores, truth = np.array([p[0] for p in pairs], float), np.array([p[1] for p in pairs])
    if truth.all() or not truth.any():
        with pytest.raises(ValueError, match="wanted pairs of both kinds"):
            auroc(scores, truth)
        return
    wins = [(a > b) + 0.5 * (a == b) for a in scores[truth] for b in scores[~truth]]
    assert auroc(scores, truth) == pytest.approx(sum(wins) / len(wins), abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6))
def test_hits_are_the_mean_over_all_orders_of_ties(pairs):
    scores, truth = np.array([p[0] for p in pairs], float), np.array([p[1] for p in pairs])
    orders = [o for o in itertools.permutations(range(len(pairs)))
              if all(scores[a] >= scores[b] for a, b in itertools.pairwise(o))]  # fmt: skip
    for k in range(1, len(pairs) + 1):
        mean = sum(truth[list(o[:k])].sum() for o in orders) / len(orders)
        assert metrics.hits(scores, truth, k) == pytest.approx(mean)
        assert precision_at(scores, truth, k) == pytest.approx(mean / k)
        if truth.any():
            assert recall_at(scores, truth, k) == pytest.approx(mean / truth.sum())


def test_figures_refuse_what_they_cannot_judge():
    scores, truth = np.arange(4.0), np.array([True, False, False, False])
    for k in (0, 5):
        with pytest.raises(ValueError, match=rf"k must be in \[1, 4\], got {k}"):
            precision_at(scores, truth, k)
    with pytest.raises(ValueError, match="wanted planted pairs, got none"):
        recall_at(scores, ~truth & False, 1)
    with pytest.raises(ValueError, match="must not be NaN"):
        auroc(np.array([1, np.nan, 2, 3]), truth)
    for wrong in (truth.astype(int), truth[:3]):
        with pytest.raises(ValueError, match=r"truth must be \[n\] bool like scores \[4\]"):
            auroc(scores, wrong)
