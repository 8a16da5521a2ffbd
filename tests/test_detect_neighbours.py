"""Neighbours must be those of brute force in fp64, also where fp32 products cannot tell."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pybackdoor.detect import nearest, neighbours


def brute_force(features: torch.Tensor, k: int):
    """(distances, rows) from differences in fp64; of equally near ones the lower row first."""
    x = features.double().numpy()
    distances = np.stack([np.sqrt(((x - row) ** 2).sum(1)) for row in x])
    np.fill_diagonal(distances, np.inf)
    rows = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, rows, 1), rows


def unit(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, dim, generator=g), dim=1)


def check(features: torch.Tensor, k: int) -> None:
    found, (distances, rows) = nearest(features, k), brute_force(features, k)
    assert found.distances.dtype == np.float64 and found.rows.dtype == np.int64
    np.testing.assert_allclose(found.distances, distances, rtol=1e-13, atol=0)
    if not np.array_equal(found.rows, rows):  # only where fp64 itself rounds two to the other order
        x = features.double().numpy()
        named = np.sqrt(((x[:, None] - x[found.rows]) ** 2).sum(2))
        np.testing.assert_allclose(named, distances, rtol=1e-13, atol=0)
        assert all(len(set(line)) == k and i not in line for i, line in enumerate(found.rows))


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 7 x 50 and differences of 40 rows, so that small sets cross every edge."""
    monkeypatch.setattr(neighbours, "_ROWS", 7)
    monkeypatch.setattr(neighbours, "_COLUMNS", 50)
    monkeypatch.setattr(neighbours, "_DIRECT", 40 * 16)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(2, 160), dim=st.sampled_from([1, 3, 16, 65]), k=st.integers(1, 40),
    scale=st.sampled_from([1e-9, 1.0, 1e6]), copies=st.integers(0, 60), seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_brute_force(n, dim, k, scale, copies, seed):
    features = unit(n, dim, seed) * scale
    features[: min(copies, n)] = features[0].clone()
    check(features, min(k, n - 1))


def test_near_duplicates_that_products_cannot_tell_apart(small_tiles):
    """A crowd within 1e-5 of one point: squared distances of 1e-10 beside squares of 1."""
    crowd = unit(1, 16) + 1e-5 * torch.randn(300, 16, generator=torch.Generator().manual_seed(1))
    features = torch.cat([crowd, unit(100, 16, 2)])
    by_products = (features.square().sum(1) / 2 - features @ features.T).fill_diagonal_(torch.inf)
    naive = by_products.topk(16, largest=False).indices.sort().values.numpy()
    _, rows = brute_force(features, 16)
    assert (naive[:300] != np.sort(rows[:300])).any(1).mean() > 0.9  # the shortcut is wrong
    found = nearest(features, 16)
    assert np.array_equal(found.rows, rows)
    check(features, 16)


def test_rows_are_tried_with_more_candidates_until_they_are_certain(small_tiles, monkeypatch):
    widths = []
    block = neighbours._Search.block
    monkeypatch.setattr(
        neighbours._Search, "block",
        lambda self, rows, width, bar: widths.append(width) or block(self, rows, width, bar),
    )  # fmt: skip
    check(unit(200, 16), 3)
    assert set(widths) == {19}
    widths.clear()
    check(torch.cat([unit(1, 16).repeat(300, 1), unit(100, 16)]), 3)
    assert set(widths) == {19, 152, 399}


def test_a_row_is_not_its_own_neighbour_but_its_copies_are():
    features = unit(9, 5)
    features[[2, 5, 8]] = features[2].clone()
    found = nearest(features, 2)
    for row, others in {2: [5, 8], 5: [2, 8], 8: [2, 5]}.items():
        assert found.rows[row].tolist() == others and found.distances[row].tolist() == [0, 0]
    same = nearest(torch.zeros(5, 3), 4)
    assert same.rows.tolist() == [[j for j in range(5) if j != i] for i in range(5)]
    assert (same.distances == 0).all()


def test_autocast_and_gradients_of_the_caller_change_nothing():
    features = unit(80, 16)
    wanted = nearest(features, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nearest(features.clone().requires_grad_(), 5)
    assert np.array_equal(found.rows, wanted.rows)
    assert np.array_equal(found.distances, wanted.distances)


@pytest.mark.gpu
def test_gpu_equals_brute_force():
    crowd = unit(1, 64) + 1e-5 * unit(300, 64, 1)
    features = torch.cat([crowd, unit(20000, 64, 2)])
    found, wanted = nearest(features.cuda(), 16), nearest(features, 16)
    assert np.array_equal(found.rows, wanted.rows)
    np.testing.assert_allclose(found.distances, wanted.distances, rtol=1e-13)


@pytest.mark.parametrize(
    "features, k, error, message",
    [
        (unit(4, 3), 4, ValueError, "k must be at least 1 and below the number of rows, 4.*got 4"),
        (unit(4, 3), 0, ValueError, "k must be at least 1.*got 0"),
        (unit(4, 3).double(), 1, TypeError, r"must be \[n, D\] float32, got torch.float64"),
        (torch.zeros(4), 1, TypeError, r"got torch.float32 \[4\]"),
        (torch.full((4, 3), math.nan), 1, ValueError, "must be finite.*got nan"),
        (torch.tensor([[1.0], [math.inf]]), 1, ValueError, "must be finite.*got inf"),
        (torch.full((4, 3), 1e30), 1, ValueError, "got 1.73"),
        (torch.full((4, 3), 1e-30), 1, ValueError, "longest row in .1e-12, 1e.15., got 1.73"),
    ],
)
def test_bad_arguments_are_named(features, k, error, message):
    with pytest.raises(error, match=message):
        nearest(features, k)
