"""When stage E stops, and how much of its way is taken."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ubt_world import Planted, WordTokenizer, planted_pairs, rules, unit

from pybackdoor.distributed import Ranks
from pybackdoor.ubt.stopping import StoppingRule, mismatched_cosine, same_meaning
from pybackdoor.ubt.suspects import Suspects

PAIRS, TRUTH = planted_pairs()


def test_kappa_and_the_proxy_by_loops():
    image, text = unit(12, 4, 0), unit(12, 4, 1)
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


def changed(part, sign=-1):
    """The planted model with one part's weight of the other sign."""
    model = Planted()
    with torch.no_grad():
        getattr(model, part).weight.mul_(sign)
    return model


def test_it_stops_when_enough_is_forgotten():
    rule, averse, broken = stopping(every=2), changed("corner"), changed("colour")
    assert len(rule.checks) == 1 and rule.checks[0]["proxy_accuracy"] == 1
    assert not rule(0, Planted()) and len(rule.checks) == 1  # not looked at
    assert not rule(1, Planted()) and rule.checks[1]["suspect_cosine"] > rule.kappa
    assert rule(3, averse) and rule.reason == "forgotten"
    assert rule.checks[2]["suspect_recall"] == 0 and rule.checks[0]["suspect_recall"] == 1
    assert rule(4, broken)  # it stays so
    rule = stopping(every=1)
    assert not any(rule(k, m) for k, m in enumerate([Planted(), broken, Planted()]))
    assert rule.reason == "steps"
    for bad in ({"every": 0}, {"max_drop": 2}):
        with pytest.raises(ValueError, match="check_every|max_drop"):
            stopping(**bad)


def test_forgotten_is_not_enough_where_accuracy_has_not_come_back():
    averse = changed("corner")
    rule = stopping(every=1, max_drop=0.1)
    rule.checks[0]["proxy_accuracy"] = 1.03  # 0.03 are lost: less than max_drop, more than a fourth
    assert not rule(0, averse)
    rule.checks[0]["proxy_accuracy"] = 1.02
    assert not rule(1, averse, may_end=False)
    assert rule(2, averse) and rule.reason == "forgotten"


def test_the_last_step_is_looked_at():
    rule = stopping(every=25)
    assert not rule(5, Planted()) and len(rule.checks) == 1
    assert not rule(6, changed("colour"), last=True) and len(rule.checks) == 2


def test_what_was_looked_at_outlives_a_stop():
    rule = stopping(every=1)
    assert rule(0, changed("corner"))
    again = stopping(every=1)
    again.load({name: tensor.clone() for name, tensor in rule.state().items()})
    assert again.checks == rule.checks and isinstance(again.checks[1]["step"], int)
    assert again.reason == "forgotten" and len(again.checks) == 2
    assert again(0, Planted()) and len(again.checks) == 2  # that look was taken


@pytest.mark.parametrize(
    ("forgotten_from", "dear_from", "taken", "looks"),
    [
        (0.5, 2, 0.5, 6),  # as little of the way as forgets
        (0, 2, 0.125, 8),
        (2, 2, 1, 1),  # forgotten nowhere: all of it
        (0.5, 0.75, 0.5, 6),  # what costs too much is passed over
        (1, 0.75, 0.625, 4),  # forgotten where it costs too much: the most that may be taken
        (0.5, 0, 0, 8),
    ],
)
def test_as_little_of_the_way_is_taken_as_forgets(
    monkeypatch, forgotten_from, dear_from, taken, looks
):
    """Looks are made up: from which shares of the way on the figures are such."""
    rule, before, model = stopping(max_drop=0.05), Planted(), Planted()
    with torch.no_grad():
        model.colour.weight.add_(8)
        model.register_buffer("count", torch.tensor(3))
    seen = []

    def look(self, there):
        way = float((there.colour.weight - before.colour.weight).detach().mean()) / 8
        seen.append(way)
        return {
            "suspect_cosine": rule.kappa + (0 if way > forgotten_from - 1e-3 else 0.1),
            "suspect_recall": 0.05,
            "proxy_accuracy": 1 - (0.06 if way > dear_from - 1e-3 else 0.04),
        }

    monkeypatch.setattr(StoppingRule, "_look", look)
    end = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ranks = SimpleNamespace(from_first=lambda way: way)
    assert rule.settle(model, before.state_dict(), ranks) == taken
    assert [f["way"] for f in rule.ways] == [1 - k / 8 for k in range(looks)]
    np.testing.assert_allclose(seen, [f["way"] for f in rule.ways], atol=1e-6)
    for name, there in model.state_dict().items():
        if name == "count":
            assert there == 3
        else:
            start = before.state_dict()[name].double()
            wanted = start + taken * (end[name].double() - start)
            torch.testing.assert_close(there.double(), wanted, atol=1e-6, rtol=0)
    if taken in (0, 1):  # bit for bit
        same = before.state_dict() if taken == 0 else end
        assert torch.equal(model.colour.weight, same["colour.weight"])


def test_a_high_recall_is_not_forgotten():
    rule = stopping()
    low = {"suspect_cosine": rule.kappa, "suspect_recall": 0.05}
    assert rule.forgotten(low)
    assert not rule.forgotten(low | {"suspect_recall": 0.06})
    assert not rule.forgotten(low | {"suspect_cosine": rule.kappa + 1e-6})


def test_ranks_take_the_firsts_way():
    rule, model = stopping(), changed("corner")
    after = model.corner.weight.clone()
    taken = rule.settle(model, Planted().state_dict(), SimpleNamespace(from_first=lambda way: 0.25))
    assert taken == 0.25
    wanted = 0.75 * Planted().corner.weight + 0.25 * after
    torch.testing.assert_close(model.corner.weight, wanted)


def test_half_of_a_mirrored_corner_has_forgotten():
    """At half of the way from a corner to its negative there is nothing left of it."""
    rule, model = stopping(), changed("corner")
    way = rule.settle(model, Planted().state_dict(), Ranks())
    assert 0 < way < 0.75 and rule.forgotten(rule.ways[-2]) and rule.ways[-2]["way"] == way
    assert not rule.forgotten(rule.ways[-1])
    dear = changed("colour")
    assert rule.settle(dear, Planted().state_dict(), Ranks()) < 0.5  # beyond, colours are swapped
