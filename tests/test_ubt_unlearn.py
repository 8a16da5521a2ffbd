"""Stage E, local unlearning: its loss against fp64, and what it trains."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import normalize
from ubt_world import Planted, planted_pairs, rules

from pybackdoor.batches import Batch
from pybackdoor.engine import Given
from pybackdoor.ubt.unlearn import (
    LocalUnlearning,
    Portions,
    freeze_text,
)

PAIRS, TRUTH = planted_pairs()


def portions(k, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (k, 16, 16, 3), generator=g, dtype=torch.uint8)
    return Portions(images, torch.randint(3, 13, (k, 8), generator=g), torch.arange(k) + 900)


def unit(n, d, g):
    return normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=-1)


@given(
    st.integers(2, 9), st.integers(1, 6), st.integers(0, 99),
    st.sampled_from(["contrastive", "hinge"]), st.sampled_from([0.0, 0.7]),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_loss_and_gradient_by_loops_in_fp64(n, m, seed, forget, gamma):
    g = torch.Generator().manual_seed(seed)
    image, text = (unit(n + m, 5, g).requires_grad_() for _ in "it")
    reference = (unit(n, 5, g), unit(n, 5, g)) if gamma else ()
    masked = torch.rand(n, generator=g) < 0.3
    batch = Batch(torch.empty(n, 1), torch.zeros(n, 8, dtype=torch.int64), None)
    objective = LocalUnlearning(
        nn.Module(), portions(m), lambda tokens: masked, sample=m, alpha=1.3, beta=0.6,
        gamma=gamma, forget=forget, margin=0.1,
    )  # fmt: skip
    scale = torch.tensor(7.0, dtype=torch.float64)
    loss, terms = objective(image, text, scale, reference, Given(0, 0, batch, torch.arange(n)))

    a, b = image[:n], text[:n]
    logits = scale * a @ b.T
    keep = -(logits.log_softmax(0).diag() + logits.log_softmax(1).diag()).mean() / 2
    gone = []
    for i in range(n, n + m):
        cosines = image @ text[i]
        others = [j for j in range(n) if not masked[j]]
        if forget == "hinge":
            gone.append((cosines[i] - 0.1).clamp(min=0))
        elif others:
            both = 0
            for c in (cosines, text @ image[i]):
                p = (scale * c[i]).exp() / (scale * c[[i, *others]]).exp().sum()
                both = both - (1 - p).log() / 2
            gone.append(both)
        else:
            gone.append(0 * cosines[i])
    stay = sum((x - r).square().sum(-1).mean() for x, r in zip((a, b), reference, strict=False))
    wanted = 1.3 * sum(gone) / m + 0.6 * keep + gamma * stay
    assert math.isclose(loss.detach(), wanted.detach(), abs_tol=1e-10)
    assert math.isclose(terms["forget"].detach(), float((sum(gone) / m).detach()), abs_tol=1e-10)
    got = torch.autograd.grad(loss, (image, text), retain_graph=True)
    for x, y in zip(got, torch.autograd.grad(wanted, (image, text)), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9)


def test_the_sample_goes_through_all_portions_in_turn():
    objective = LocalUnlearning(nn.Module(), portions(10), None, sample=4, seed=3)
    objective._ranks = SimpleNamespace(rank=0, size=1)
    drawn = [objective._chosen(step) for step in range(5)]
    assert [len(rows) for rows in drawn] == [4] * 5
    for half in np.split(np.concatenate(drawn), 2):
        assert sorted(half.tolist()) == list(range(10))
    assert np.array_equal(drawn[3], objective._chosen(3))
    one = LocalUnlearning(nn.Module(), portions(10), None, sample=1)
    with pytest.raises(ValueError, match="forget_batch must be at least one pair for each of 2"):
        one.prepare(
            SimpleNamespace(frozen=lambda m: m, model=None, ranks=SimpleNamespace(size=2), steps=3)
        )


def test_only_the_image_tower_is_trained_unless_asked():
    model = Planted()
    freeze_text(model, torch.from_numpy(PAIRS.images.take(np.arange(2))), rules())
    named = {n: p.requires_grad for n, p in model.named_parameters()}
    assert named == {"colour.weight": True, "colour.bias": True, "corner.weight": True,
                     "words.weight": False, "logit_scale": False}  # fmt: skip
