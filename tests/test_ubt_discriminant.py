"""The discriminant behind the ranking by fragility, and where its heights part."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pybackdoor.ubt.discriminant import (
    directions,
    discriminant,
    grown,
    moments,
    parted,
    settled,
    standard,
)
from pybackdoor.ubt.gate import top


def group(n, inside, away, seed=1, d=6):
    """[n, d] normal rows, the first of which lie away along one axis."""
    x = np.random.default_rng(seed).normal(size=(n, d))
    x[:inside, 2] += away
    return x


@pytest.mark.parametrize("least", [7, 15, 50])
@pytest.mark.parametrize("inside", [60, 120, 330, 480])
def test_as_many_are_suspicious_as_stand_apart(least, inside):
    x = group(1000, inside, 8)
    start = x[:, 2] + np.random.default_rng(2).normal(size=1000)
    height, k = grown(x, start, least)
    assert abs(k - inside) <= 2 and (top(height, inside - 2) < inside).all()
    assert k == parted(height, least, 500).k  # at rest
    np.testing.assert_allclose(discriminant(x, top(height, k), moments(x)), height)


def test_a_group_of_more_than_half_is_not_cut_at_half():
    x = group(2000, 1100, 8)
    height, k = grown(x, x[:, 2], 30)
    assert k < 980 and (top(height, k) < 1100).all()  # a part of it
    x = group(2000, 10, 8)
    height, k = grown(x, x[:, 2], 30)
    assert 30 <= k < 1000 and np.isin(np.arange(10), top(height, 30)).sum() >= 8


@pytest.mark.parametrize("seed", range(6))
def test_a_group_ends_before_a_larger_one_that_lies_half_way(seed):
    """Cut where heights part best with both above, five in six rows were the other one's."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4000, 20))
    x[:150, 2] += rng.normal(7, 3, 150)
    x[150:750, [2, 3]] += 3
    x = standard(x)
    height, k = grown(x, x[:, 2], 64)
    assert 100 < k < 150 and (top(height, k) < 150).mean() > 0.85


@pytest.mark.parametrize(
    ("n", "d", "poison", "off", "other", "far"),
    [
        (4000, 20, 0.02, 10, 0.4, 6),
        (4000, 20, 0.05, 8, 0.4, 8),
        (1500, 79, 0.1, 8, 0.5, 8),
        (1500, 79, 0.2, 6, 0.5, 8),
        (1500, 79, 1 / 3, 6, 0.5, 8),
    ],
)
def test_a_larger_group_that_parts_better_is_not_taken_for_it(n, d, poison, off, other, far):
    for seed in range(3):
        x = np.random.default_rng(seed).normal(size=(n, d))
        inside = round(n * poison)
        x[:inside, 0] += off
        x[n - round(n * other) :, 1] += far
        x = standard(x)
        height, k = grown(x, settled(x, x[:, 0], min(256, inside)), 64)
        assert abs(k - inside) <= 0.03 * inside and (top(height, k) < inside).mean() > 0.97


@pytest.mark.parametrize("share", [0.05, 1 / 3])
def test_what_is_spread_out_is_found_whole(share):
    """Its most extreme rows stand off farther than all of it does, in spreads of their own."""
    n, inside = 4000, round(4000 * share)
    x = group(n, inside, 0, d=20)
    x[:inside, 2] += 5 + np.random.default_rng(4).gamma(2, 2, inside)
    height, k = grown(x, x[:, 2], 64)
    assert abs(k - inside) <= 0.06 * inside
    assert (top(height, k) < inside).mean() > 0.95


def error(height, k):
    """Of a cut after the k highest, in extended precision: less the one normal's, in nats a row."""
    h = np.sort(height.astype(np.longdouble))[::-1]
    gain, whole = 0.0, h.var()
    for part in (h[:k], h[k:]):
        share = len(part) / len(h)
        gain += share * (math.log(share) + np.log(whole / max(part.var(), 1e-6 * whole)) / 2)
    return float(gain)


@settings(max_examples=50)
@given(
    n=st.integers(20, 60), seed=st.integers(0, 99), scale=st.sampled_from([1e-6, 1.0, 1e6]),
    away=st.floats(0, 9), shift=st.sampled_from([0.0, -300.0]),
)  # fmt: skip
def test_the_cut_is_the_one_of_least_error(n, seed, scale, away, shift):
    height = scale * (group(n, n // 4, away, seed)[:, 2] + shift)
    found = parted(height, 5, n // 2)
    errors = [error(height, k) for k in range(5, n // 2 + 1)]
    assert found.gain == pytest.approx(max(errors), abs=1e-6)
    assert errors[found.k - 5] == pytest.approx(max(errors), abs=1e-6)


def test_equal_heights_have_a_cut():
    assert parted(np.full(30, 0.1), 5, 15) == (5, 0)
    two = parted(np.repeat([1.0, 0.0], [8, 22]), 5, 15)
    assert two.k == 8 and math.isfinite(two.gain)


def test_equal_rows_apart_from_equal_rows_are_told_apart():
    x = np.repeat([[1.0, 0], [0.0, 1]], [80, 520], 0)
    height, k = grown(x, x[:, 0], 20)
    assert k == 80 and np.isfinite(height).all() and (np.sort(top(height, 80)) < 80).all()


def test_a_discriminant_is_fishers_and_a_settled_one_its_own_seed():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5)) * [1, 2, 1, 1, 0.5]
    x[:40, 1] += 8
    height = discriminant(x, np.arange(40), moments(x))
    a, b = x[:40], x[40:]
    within = (np.cov(a.T, bias=True) + np.cov(b.T, bias=True)) / 2 + 0.05 * np.eye(5)
    direction = np.linalg.solve(within, a.mean(0) - b.mean(0))
    assert np.corrcoef(height, x @ direction)[0, 1] == pytest.approx(1)
    found = settled(x, rng.normal(size=200) + 2 * (np.arange(200) < 40), 40)
    assert (top(found, 40) < 40).mean() > 0.9
    np.testing.assert_allclose(discriminant(x, top(found, 40), moments(x)), found)


def test_principal_directions_and_standard_columns():
    wide = np.random.default_rng(0).normal(size=(300, 80)) @ np.diag(np.arange(80.0))
    kept = directions(wide)
    assert kept.shape == (300, 64)
    u, s, _ = np.linalg.svd(wide - wide.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(kept[:, ::-1]), np.abs(u[:, :64] * s[:64]), atol=1e-6)
    narrow = wide[:, :5]
    np.testing.assert_allclose(directions(narrow), narrow - narrow.mean(0))
    assert np.isfinite(standard(np.ones((4, 2)))).all()
    np.testing.assert_allclose(standard(narrow[:, 1:]).std(0), 1)
