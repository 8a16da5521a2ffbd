"""Drift repair's rotation: its objective against autograd and torch's own, and what it finds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from repair_cases import judged, turn
from torch import Tensor

from pybackdoor.rotation import (
    CLOSE,
    ROWS,
    TEXTS,
    Fit,
    Rows,
    kept_rotation,
    nearest_rotation,
    slope,
)


def unit(g: torch.Generator, *shape: int) -> Tensor:
    return F.normalize(torch.randn(shape, generator=g, dtype=torch.float64), dim=-1)


@given(st.integers(1, 12), st.integers(2, 7), st.floats(0.5, 40), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_objective_and_slope_are_those_of_autograd(n, dim, scale, seed):
    g = torch.Generator().manual_seed(seed)
    new, old = (Rows(unit(g, n, dim), unit(g, n, dim)) for _ in range(2))
    skew = torch.zeros(dim, dim, dtype=torch.float64, requires_grad=True)
    turned = new.turned(torch.matrix_exp(skew - skew.T))
    own = (scale * new.image @ new.text.T).log_softmax(1)

    def divergence(image: Tensor, text: Tensor) -> Tensor:
        other = (scale * image @ text.T).log_softmax(1)
        return F.kl_div(other, own, log_target=True, reduction="batchmean")

    wanted = {
        "image": (turned.image - old.image).square().sum(1).mean(),
        "text": (turned.text - old.text).square().sum(1).mean(),
        "old_images": divergence(old.image, turned.text),
        "old_texts": divergence(turned.image, old.text),
    }
    total = CLOSE * (wanted["image"] + wanted["text"])
    total = total + wanted["old_images"] + TEXTS * wanted["old_texts"]
    values = {name: value.item() for name, value in wanted.items()}
    assert judged(torch.stack(list(new)), torch.stack(list(old)), scale) == pytest.approx(values)
    found = Fit.of(new, old, scale)
    assert found._asdict() == pytest.approx(values, abs=1e-12)
    assert found.objective == pytest.approx(total.item(), abs=1e-12)
    (grad,) = torch.autograd.grad(total, skew)
    torch.testing.assert_close(2 * slope(new, old, scale), grad, rtol=0, atol=1e-10)


def test_stored_rows_are_found_again_where_the_gap_between_the_towers_has_changed():
    """Sixty classes, five images each; what all images and what all texts share is another."""
    g = torch.Generator().manual_seed(0)
    dim, classes, each = 24, 60, 5
    labels = torch.arange(classes).repeat(each)
    centres, shared = unit(g, classes, dim), unit(g, 4, dim)

    def model(of_images: Tensor, of_texts: Tensor) -> Rows:
        image = centres[labels] + 1.5 * unit(g, len(labels), dim) + of_images
        text = centres + 0.3 * unit(g, classes, dim) + of_texts
        return Rows(F.normalize(image, dim=1), F.normalize(text, dim=1)[labels])

    old, new = model(*shared[:2]), model(*shared[2:]).turned(turn(dim))
    nearest = nearest_rotation(new.image.T @ old.image + new.text.T @ old.text)[0]
    kept = kept_rotation(new, old, 20.0, nearest)
    eye = torch.eye(dim, dtype=torch.float64)
    torch.testing.assert_close(kept.T @ kept, eye, rtol=0, atol=1e-12)

    def hits(image: Tensor, text: Tensor) -> float:
        return float(((image @ text[:classes].T).argmax(1) == labels).double().mean())

    own, before = hits(*new), new.turned(nearest)
    assert min(hits(old.image, before.text), hits(before.image, old.text)) < own - 0.1
    after = new.turned(kept)
    assert min(hits(old.image, after.text), hits(after.image, old.text)) > own - 0.02
    assert Fit.of(after, old, 20.0).objective < Fit.of(before, old, 20.0).objective
    assert torch.equal(kept, kept_rotation(new, old, 20.0, nearest))  # draws of their own seed


def test_the_search_ends_where_the_objective_is_flat():
    """Two dimensions, where all rotations can be tried."""
    g = torch.Generator().manual_seed(3)
    new, old = (Rows(unit(g, 40, 2), unit(g, 40, 2)) for _ in range(2))
    found = kept_rotation(new, old, 5.0, torch.eye(2, dtype=torch.float64))
    angles = torch.linspace(-torch.pi, torch.pi, 721, dtype=torch.float64)
    turns = [torch.tensor([[a.cos(), -a.sin()], [a.sin(), a.cos()]]).double() for a in angles]
    values = torch.tensor([Fit.of(new.turned(t), old, 5.0).objective for t in turns])
    reached = Fit.of(new.turned(found), old, 5.0).objective
    lowest = (values[1:-1] < values[:-2]) & (values[1:-1] < values[2:])  # local minima
    assert (values[1:-1][lowest] - reached).abs().min() < 1e-3
    assert reached < Fit.of(new, old, 5.0).objective


@pytest.mark.parametrize("scale", [1.0, 100.0, 22026.0])
def test_fp32_finds_what_fp64_finds(scale):
    g = torch.Generator().manual_seed(2)
    new, old = (Rows(unit(g, 90, 12), unit(g, 90, 12)) for _ in range(2))
    eye = torch.eye(12, dtype=torch.float64)
    found = [
        Fit.of(new.turned(kept_rotation(*rows, scale, eye)), old, scale).objective
        for rows in ((new, old), [Rows(*(x.float() for x in each)) for each in (new, old)])
    ]
    assert found[1] == pytest.approx(found[0], rel=0.02)
    assert max(found) < 0.9 * Fit.of(new, old, scale).objective
    sloped = [slope(Rows(*(x.to(t) for x in new)), Rows(*(x.to(t) for x in old)), scale).double()
              for t in (torch.float64, torch.float32)]  # fmt: skip
    error = (sloped[1] - sloped[0]).norm() / sloped[0].norm()
    assert error < 1e-6 * max(1, scale / 10)


@pytest.mark.gpu
def test_a_gpu_finds_what_the_cpu_finds():
    g = torch.Generator().manual_seed(2)
    new, old = (Rows(unit(g, 90, 12), unit(g, 90, 12)) for _ in range(2))
    eye = torch.eye(12, dtype=torch.float64)
    moved = [Rows(*(x.float().cuda() for x in each)) for each in (new, old)]
    assert Fit.of(*moved, 10.0) == pytest.approx(Fit.of(new, old, 10.0), rel=1e-4)
    found = [kept_rotation(*rows, 10.0, eye) for rows in ((new, old), moved)]
    objectives = [Fit.of(new.turned(rotation), old, 10.0).objective for rotation in found]
    assert found[1].device.type == "cpu" and objectives[1] == pytest.approx(objectives[0], rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_best_rotation_rounding_moves_little(dtype):
    g = torch.Generator().manual_seed(1)
    old = Rows(*(unit(g, 40, 6).to(dtype) for _ in range(2)))
    eye = torch.eye(6, dtype=torch.float64)
    moved = kept_rotation(old, old, 10.0, eye) - eye
    assert moved.norm() < 0.02
    one = Rows(*(unit(g, 1, 6).to(dtype) for _ in range(2)))
    assert Fit.of(one, one, 10.0) == (0, 0, 0, 0)


def test_many_pairs_are_judged_in_blocks():
    g = torch.Generator().manual_seed(4)
    n = 2 * ROWS + 1
    new, old = (Rows(unit(g, n, 3), unit(g, n, 3)) for _ in range(2))
    parts = [slice(0, 342), slice(342, 684), slice(684, n)]
    wanted = [Fit.of(Rows(*(x[p] for x in new)), Rows(*(x[p] for x in old)), 3.0) for p in parts]
    sizes = torch.tensor([342.0, 342.0, n - 684.0], dtype=torch.float64)
    means = sizes @ torch.tensor(wanted, dtype=torch.float64) / n
    assert n == 1025 and Fit.of(new, old, 3.0) == pytest.approx(means.tolist())


@given(st.integers(2, 9), st.integers(0, 12), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_rotation_is_orthogonal_best_and_nearest_to_the_identity(dim, n, seed):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, n, dim, generator=g, dtype=torch.float64)
    cross = a.T @ b
    rotation, rank = nearest_rotation(cross)
    assert rank == min(n, dim)
    eye = torch.eye(dim, dtype=torch.float64)
    torch.testing.assert_close(rotation.T @ rotation, eye, rtol=0, atol=1e-12)
    best = torch.linalg.svdvals(cross).sum()
    assert (rotation * cross).sum() == pytest.approx(best.item(), abs=1e-10)
    if rank < dim:  # any other way to turn what the pairs do not speak of is farther from it
        null = torch.linalg.svd(cross)[2][rank:]
        for trial in range(5):
            other = rotation @ (eye - null.T @ null + null.T @ turn(dim - rank, trial) @ null)
            torch.testing.assert_close((other * cross).sum(), best, rtol=0, atol=1e-10)
            assert other.trace() <= rotation.trace() + 1e-12
    assert torch.equal(
        nearest_rotation(torch.zeros(3, 3).double())[0].round(decimals=12), torch.eye(3).double()
    )
