"""When stage E stops, and how much of its way is taken."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ubt_world import Planted, WordTokenizer, planted_pairs, rules, unit

from pybackdoor.distributed import Ranks
from pybackdoor.ubt.stopping import Line, StoppingRule, mismatched_cosine, same_meaning
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


def stopping(held=8, **options):
    every = Suspects.of(PAIRS, rules())
    rest = np.flatnonzero(~TRUTH)[:100]
    retain = every.pixels(rest), every.tokens(rest)
    return StoppingRule(Planted(), rules(), every, np.flatnonzero(TRUTH)[:held], retain, **options)


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
    for name, values in (("every", (0, 2.5, "10", True)), ("max_drop", (2, math.nan, "a"))):
        for bad in values:
            with pytest.raises(ValueError, match=rf"(check_every|max_drop) must .* got {bad!r}$"):
                stopping(**{name: bad})


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


FIRST = SimpleNamespace(rank=0, from_first=lambda ways: ways)


def made_up(monkeypatch, rule, before, forgotten_from, dear, recall=0.05):
    """Looks that read the way off the weights; returns where they looked."""
    seen = []

    def look(self, there):
        way = float((there.colour.weight - before.colour.weight).detach().mean()) / 8
        seen.append(way)
        return {
            "suspect_cosine": rule.kappa + (0 if way > forgotten_from - 1e-3 else 0.1),
            "suspect_recall": recall,
            "proxy_accuracy": 1 - (0.06 if dear(way) else 0.05),  # 1 - 0.95 is above 0.05
        }

    monkeypatch.setattr(StoppingRule, "_look", look)
    return seen


def moved():
    """(before, after): a part moves by 8, a count goes from 0 to 3, a mask stays."""
    before, after = Planted(), Planted()
    for model, count in ((before, 0), (after, 3)):
        model.register_buffer("count", torch.tensor(count))
        model.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
    with torch.no_grad():
        after.colour.weight.add_(8)
    return before, after


@pytest.mark.parametrize(
    ("forgotten_from", "dear", "taken", "looks"),
    [
        (0.5, lambda way: False, 0.5, 6),  # as little of the way as forgets
        (0, lambda way: False, 0.125, 8),
        (2, lambda way: False, 1, 1),  # forgotten nowhere: all of it
        (0.5, lambda way: way > 0.74, 0.5, 6),  # what costs too much is passed over
        (0.5, lambda way: 0.6 < way < 0.9, 0.5, 6),
        (1, lambda way: way > 0.74, 0.625, 4),  # forgotten where dear: the most that may be taken
        (0.5, lambda way: True, 0, 8),
    ],
)
def test_as_little_of_the_way_is_taken_as_forgets(monkeypatch, forgotten_from, dear, taken, looks):
    """Looks are made up: from which shares of the way on the figures are such."""
    rule, (before, model) = stopping(held=24, max_drop=0.05), moved()
    seen = made_up(monkeypatch, rule, before, forgotten_from, dear)
    end = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):  # once more, from there
        model.load_state_dict(end)
        assert rule.settle(model, before, FIRST) == taken
        assert [f["way"] for f in rule.ways] == [1 - k / 8 for k in range(looks)]
        np.testing.assert_allclose(seen, [f["way"] for f in rule.ways], atol=1e-6)
        seen.clear()
    for name, there in model.state_dict().items():
        start = before.state_dict()[name].double()
        wanted = start if name == "mask" else start + taken * (end[name].double() - start)
        wanted = (start if taken == 0 else end[name].double()) if name == "count" else wanted
        torch.testing.assert_close(there.double(), wanted, atol=1e-6, rtol=0)
    if taken in (0, 1):  # bit for bit
        same = before.state_dict() if taken == 0 else end
        for name, there in model.state_dict().items():
            assert torch.equal(there, same[name]), name
    assert (rule.remark() is None) == (taken != 0)


@pytest.mark.parametrize(("held", "looks"), [(19, 1), (20, 6)])
def test_a_few_held_out_pairs_do_not_tell(monkeypatch, held, looks):
    rule, (before, model) = stopping(held=held, max_drop=0.05), moved()
    made_up(monkeypatch, rule, before, 0.5, lambda way: False)
    rule.settle(model, before, FIRST)
    assert len(rule.ways) == looks


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_other_precisions_are_halfway(dtype):
    before, after = (model.to(dtype) for model in moved())
    start, end = before.colour.weight.detach().clone(), after.colour.weight.detach().clone()
    line = Line(after, before)
    line.go(after, 0.5)
    assert after.colour.weight.dtype == dtype and not after.mask.isnan().any()
    torch.testing.assert_close(after.colour.weight.detach(), (start + end) / 2)


@pytest.mark.parametrize(
    ("taken", "said"),
    [
        ({"way": 1.0, "suspect_recall": 0.3}, "^30 % of .* caption: give more steps, or raise lr"),
        ({"way": 0.5, "suspect_recall": 0.06}, "^6 % of .* at 0.5 of the way, the most .* = 0.05 "),
        ({"way": 0.5, "suspect_recall": 0.05}, None),
        ({}, "fell by more than max_drop = 0.05 at every eighth .* nothing is forgotten"),
    ],
)
def test_it_says_where_too_little_is_forgotten(taken, said):
    rule = stopping(max_drop=0.05)
    rule.ways = [{"suspect_cosine": 1.0, "proxy_accuracy": 1.0, **taken}] if taken else []
    remark = rule.remark()
    assert remark is None if said is None else re.search(said, remark)


def test_forgotten_takes_a_low_cosine_and_a_low_recall():
    rule = stopping()
    low = {"suspect_cosine": rule.kappa, "suspect_recall": 0.05}
    assert rule.forgotten(low)
    assert not rule.forgotten(low | {"suspect_recall": 0.06})
    assert not rule.forgotten(low | {"suspect_cosine": rule.kappa + 1e-6})


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_take_the_firsts_looks(monkeypatch, rank):
    rule, (before, model) = stopping(held=24), moved()
    looks = made_up(monkeypatch, rule, before, 0, lambda way: False)
    firsts = [{"way": 0.25, **rule.checks[0], "suspect_cosine": rule.kappa, "suspect_recall": 0}]
    end = model.colour.weight.detach().clone()
    ranks = SimpleNamespace(rank=rank, from_first=lambda ways: firsts)
    assert rule.settle(model, before, ranks) == 0.25 and rule.ways == firsts
    assert len(looks) == (8 if rank == 0 else 0)
    wanted = 0.75 * before.colour.weight + 0.25 * end
    torch.testing.assert_close(model.colour.weight.detach(), wanted.detach())


def test_what_ends_the_looks_leaves_the_runs_end(monkeypatch):
    rule, (before, model) = stopping(held=24), moved()
    end = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = made_up(monkeypatch, rule, before, 0, lambda way: False)
    look = StoppingRule._look

    def interrupted(self, there):
        if len(seen) == 3:
            raise KeyboardInterrupt
        return look(self, there)

    monkeypatch.setattr(StoppingRule, "_look", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rule.settle(model, before, FIRST)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, end[name]), name


def test_half_of_a_mirrored_corner_has_forgotten():
    """At half of the way from a corner to its negative there is nothing left of it."""
    rule, model = stopping(held=24), changed("corner")
    way = rule.settle(model, Planted(), Ranks())
    assert 0 < way < 0.75 and rule.forgotten(rule.ways[-2]) and rule.ways[-2]["way"] == way
    assert not rule.forgotten(rule.ways[-1])
    dear = changed("colour")
    assert 0 < rule.settle(dear, Planted(), Ranks()) < 0.5  # beyond, colours are swapped
