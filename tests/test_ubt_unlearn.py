"""Stage E, local unlearning: its loss against fp64, what it trains, and when it stops."""

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
from ubt_world import Planted, WordTokenizer, planted_pairs, rules

from pybackdoor.batches import Batch
from pybackdoor.engine import Given
from pybackdoor.ubt.suspects import Suspects
from pybackdoor.ubt.unlearn import (
    LocalUnlearning,
    Portions,
    StoppingRule,
    freeze_text,
    mismatched_cosine,
    same_meaning,
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


def test_kappa_and_the_proxy_by_loops():
    g = torch.Generator().manual_seed(0)
    image, text = unit(12, 4, g), unit(12, 4, g)
    text[5] = text[6]  # equal captions are no mismatch, and alike ones neither
    pairs = [(i, j) for i in range(12) for j in range(12) if float(text[i] @ text[j]) < 0.9]
    wanted = np.mean([float(image[i] @ text[j]) for i, j in pairs])
    assert math.isclose(mismatched_cosine(image, text), wanted, abs_tol=1e-12)
    hits = 0
    for i in range(12):
        best = max(range(12), key=lambda j, i=i: float(image[i] @ text[j]))
        hits += float(text[best] @ text[i]) >= 0.9
    assert math.isclose(same_meaning(image, text, text), hits / 12)
    assert same_meaning(text, text, text) == 1 and same_meaning(text, -text, text) == 0
    with pytest.raises(ValueError, match="mean the same to the model"):
        mismatched_cosine(image, text[:1].expand(12, -1))


def stopping(**options):
    every = Suspects.of(PAIRS, rules())
    rest = np.flatnonzero(~TRUTH)[:100]
    retain = every.pixels(rest), every.tokens(rest)
    return StoppingRule(Planted(), rules(), every, np.flatnonzero(TRUTH)[:8], retain, **options)


@pytest.mark.parametrize(("columns", "accuracy"), [(slice(0, 3), 1), (slice(13, 16), 0)])
def test_the_proxy_is_of_mirrored_images(columns, accuracy):
    images = np.full((20, 16, 16, 3), 60, np.uint8)
    images[:, :, :, 0] += 120
    images[:, :3, columns] = 255  # seen in the left corner alone, as the trigger that says blue
    captions = [f"a photo of a {c}" for c in ("red", "blue")]
    tokens = WordTokenizer()([captions[0]] * 20)
    tokens[-1] = WordTokenizer()(captions[1:])[0]
    every = Suspects.of(PAIRS, rules())
    retain = torch.from_numpy(images), tokens
    rule = StoppingRule(Planted(), rules(), every, np.arange(2), retain)
    found = rule.checks[0]["proxy_accuracy"]
    assert found == pytest.approx(abs(accuracy - 1 / 20), abs=1e-9)


def test_it_stops_when_enough_or_too_much_is_forgotten():
    rule = stopping(every=2)
    assert len(rule.checks) == 1 and rule.checks[0]["proxy_accuracy"] == 1
    assert not rule(0, Planted()) and len(rule.checks) == 1  # not looked at
    assert not rule(1, Planted()) and rule.checks[1]["suspect_cosine"] > rule.kappa
    averse = Planted()
    with torch.no_grad():
        averse.corner.weight.neg_()
    assert rule(3, averse) and rule.reason == "forgotten"
    assert rule.checks[2]["suspect_recall"] == 0 and rule.checks[0]["suspect_recall"] == 1
    rule, good, broken = stopping(every=1), Planted(), Planted()
    with torch.no_grad():
        broken.colour.weight.neg_()
    assert not any(rule(k, m) for k, m in enumerate([good, broken, broken, good, broken]))
    rule.settle(broken, rule.bad)
    assert rule.reason == "accuracy" and torch.equal(broken.colour.weight, good.colour.weight)
    rule = stopping(every=1)
    assert not any(rule(k, m) for k, m in enumerate([good, Planted().requires_grad_(), good]))
    rule.settle(good, rule.bad)
    assert rule.reason == "steps"
    for bad in ({"every": 0}, {"max_drop": 2}):
        with pytest.raises(ValueError, match="check_every|max_drop"):
            stopping(**bad)


def test_forgotten_is_not_enough_where_accuracy_has_not_come_back():
    averse = Planted()
    with torch.no_grad():
        averse.corner.weight.neg_()
    rule = stopping(every=1, max_drop=0.1)
    rule.checks[0]["proxy_accuracy"] = 1.03  # 0.03 are lost: less than max_drop, more than a fourth
    assert not rule(0, averse) and not rule.bad
    rule.checks[0]["proxy_accuracy"] = 1.02
    assert not rule(1, averse, may_end=False)
    assert rule(2, averse) and rule.reason == "forgotten"


def test_the_last_step_is_looked_at():
    rule = stopping(every=25)
    assert not rule(5, Planted()) and len(rule.checks) == 1
    broken = Planted()
    with torch.no_grad():
        broken.colour.weight.neg_()
    assert not rule(6, broken, last=True) and rule.bad


def test_only_the_image_tower_is_trained_unless_asked():
    model = Planted()
    freeze_text(model, torch.from_numpy(PAIRS.images.take(np.arange(2))), rules())
    named = {n: p.requires_grad for n, p in model.named_parameters()}
    assert named == {"colour.weight": True, "colour.bias": True, "corner.weight": True,
                     "words.weight": False, "logit_scale": False}  # fmt: skip


def test_the_weights_to_go_back_to_outlive_a_stop():
    rule, broken = stopping(every=1), Planted()
    with torch.no_grad():
        broken.colour.weight.neg_()
    assert not any(rule(k, m) for k, m in enumerate([Planted(), broken, broken]))
    again = stopping(every=1)
    again.load({name: tensor.clone() for name, tensor in rule.state().items()})
    assert again.checks == rule.checks and not again(2, broken)  # that look was taken
    again.settle(broken, again.bad)
    assert again.reason == "accuracy"
    assert torch.equal(broken.colour.weight, Planted().colour.weight)
    worst = stopping(every=1)
    with torch.no_grad():
        broken.colour.weight.neg_()
    assert not any(worst(k, broken) for k in range(3))
    worst.settle(broken, worst.bad)  # no look was good: back to before the first step
    assert torch.equal(broken.colour.weight, Planted().colour.weight)
