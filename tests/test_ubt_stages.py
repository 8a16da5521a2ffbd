"""UBT-style stages A to D, each against numbers worked out another way."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ubt_world import (
    MEAN,
    STD,
    Planted,
    WordTokenizer,
    captioned,
    planted_pairs,
    rules,
    unit,
)

from pybackdoor.batches import InputRules
from pybackdoor.data import PairLoader
from pybackdoor.ubt.overfit import MeanCosine, overfit
from pybackdoor.ubt.reading import ImageRows, Reader, pair_cosines
from pybackdoor.ubt.suspects import RowLoader, Suspects
from pybackdoor.ubt.weak import priorities, weak_pool

CPU = torch.device("cpu")
PAIRS, TRUTH = planted_pairs()


def suspects(pairs=PAIRS):
    return Suspects.of(pairs, rules())


def test_every_kind_of_source_gives_the_same_pairs():
    loader = PairLoader(PAIRS, WordTokenizer(), batch_size=64, shuffle=False, drop_last=False)
    rows = np.array([3, 500, 0])
    found = [suspects(), Suspects.of(loader, rules()), Suspects.of(list(loader), rules())]
    for each in found:
        assert len(each) == each.total == 600
        assert torch.equal(each.tokens(rows), found[0].tokens(rows))
        assert torch.equal(each.pixels(rows), found[0].pixels(rows))
        assert each.ids.tolist() == PAIRS.ids.tolist()
        words = [len(PAIRS.captions[int(row)].split()) for row in rows]
        lengths = each.different.lengths()[each.caption[rows]]
        assert [min(n + 3, 8) for n in words] == lengths.tolist()
    assert found[0].text(3) == PAIRS.captions[3] and found[2].text(3) is None


def test_rows_come_once_an_epoch_and_the_weak_ones_more_often():
    every = suspects()
    rows = np.arange(100, 200)
    plain = RowLoader(every, rows, batch_size=32, seed=1)
    ids = torch.cat([b["ids"] for b in plain])
    assert len(plain) == 3 and len(ids) == 96 and len(set(ids.tolist())) == 96
    again = torch.cat([b["ids"] for b in plain])
    plain.set_epoch(1)
    assert torch.equal(ids, again) and not torch.equal(ids, torch.cat([b["ids"] for b in plain]))
    batch = next(iter(plain))
    where = [int(np.flatnonzero(every.ids == i)[0]) for i in batch["ids"]]
    assert torch.equal(batch["tokens"], every.tokens(np.array(where)))
    weak = RowLoader(every, rows, batch_size=100, priority=priorities(100))
    drawn = np.zeros(600)
    for epoch in range(200):
        weak.set_epoch(epoch)
        np.add.at(drawn, next(iter(weak))["ids"].numpy(), 1)
    assert drawn[:100].sum() == 0 and drawn[100:125].sum() == pytest.approx(8781, rel=0.05)
    assert math.isclose(priorities(4)[0], 0.4) and math.isclose(priorities(100).sum(), 1)
    with pytest.raises(ValueError, match="batch_size must be at least 2"):
        RowLoader(every, rows, batch_size=1)
    with pytest.raises(ValueError, match="rows must be at least 2, got 1"):
        RowLoader(every, rows[:1], batch_size=4)


def test_weak_pool_takes_the_tails():
    c = np.array([0.5, 0.1, 0.9, 0.3, 0.7, 0.2, 0.8, 0.4, 0.6, 0.0])
    assert weak_pool(c, 0.3).tolist() == [9, 1, 5]
    assert weak_pool(c, 0.3, "high").tolist() == [2, 6, 4]
    assert weak_pool(c, 0.5, "both").tolist() == [9, 2, 1, 6, 5]
    assert len(weak_pool(c, 0.01)) == 2 and len(weak_pool(c, 1.0, "both")) == 10
    with pytest.raises(ValueError, match="got 'hihg' .did you mean 'high'"):
        weak_pool(c, 0.1, "hihg")
    with pytest.raises(ValueError, match=r"weak_share must be in .0, 1., got 0"):
        weak_pool(c, 0)


def test_mean_cosine_is_the_mean_cosine():
    image, text = unit(7, 5).requires_grad_(), unit(7, 5, 1)
    loss, _ = MeanCosine()(image, text, torch.ones(()), (), SimpleNamespace(counts=None))
    loss.backward()
    wanted = -np.mean([float(a @ b) for a, b in zip(image.detach(), text, strict=True)])
    assert math.isclose(loss.detach(), wanted)
    torch.testing.assert_close(image.grad, -text / 7, rtol=0, atol=1e-15)


@pytest.mark.parametrize("loss", ["cosine", "contrastive"])
def test_overfitting_raises_the_pool_and_leaves_the_model(loss):
    model, every = Planted(), suspects()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    reader = Reader(model, rules())
    cosines = pair_cosines(reader.images(every), reader.captions(every), every)
    direct = [
        float(
            reader.images(every, np.array([i]))[0] @ reader.tokens(every.tokens(np.array([i])))[0]
        )
        for i in range(5)
    ]
    assert cosines[:5] == pytest.approx(direct, abs=1e-6)
    pool = weak_pool(cosines, 0.05)
    options = {"rules": rules(), "device": CPU, "steps": 20, "lr": 1e-2, "batch_size": 16}
    a, b = (overfit(model, every, pool, loss=loss, progress=False, **options) for _ in range(2))
    after = Reader(a, rules())
    gained = pair_cosines(after.images(every), after.captions(every), every) - cosines
    if loss == "cosine":
        assert gained[pool].mean() > 0.05
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name])
        assert torch.equal(model.state_dict()[name], before[name])
    assert torch.equal(a.logit_scale, model.logit_scale)
    with pytest.raises(ValueError, match="overfit_loss must be one of cosine, contrastive"):
        overfit(model, every, pool, loss="cosin", **options)


def test_image_rows_are_encoded_once_when_asked_for():
    every, asked = suspects(), []
    reader = Reader(Planted(), rules())
    whole = reader.images(every)

    class Counting:
        check_pixels = reader.check_pixels

        def images(self, suspects, rows):
            asked.append(rows.tolist())
            return reader.images(suspects, rows)

    image = ImageRows(Counting(), every)
    assert len(image) == len(every)
    with pytest.raises(ValueError, match="at least one image"):
        image.at(np.empty(0, int))
    for rows in ([7, 3, 7], [3, 5], [5, 7]):
        torch.testing.assert_close(image.at(np.array(rows)), whole[rows])
    assert asked == [[3, 7], [5]]
    with pytest.raises(ValueError, match="at least one image"):
        image.at(np.empty(0, int))
    torch.testing.assert_close(image.all(), whole)
    assert sorted(sum(asked, [])) == list(range(len(every)))


def batch_of(side, length):
    return torch.zeros(2, 3, side, side, dtype=torch.uint8), torch.ones(2, length).long()


BAD = {
    "equal": (lambda: captioned("red", "red", "red"), "captions of all 3 pairs are equal"),
    "one": (lambda: captioned("red"), "must hold at least 2 usable pairs, got 1"),
    "no tokenizer": (
        lambda: Suspects.of(PAIRS, InputRules.of(Planted(), mean=MEAN, std=STD)),
        "tokenizer= is needed",
    ),
    "nothing": (lambda: Suspects.of([], rules()), "suspect_loader is empty"),
    "floats": (
        lambda: Suspects.of([(torch.zeros(2, 3, 16, 16), torch.ones(2, 4).long())], rules()),
        "must yield uint8 images, .* leave ToTensor and Normalize out",
    ),
    "sizes": (
        lambda: Suspects.of([batch_of(16, 4), batch_of(17, 4)], rules()),
        r"must yield images of one size, got \(16, 16, 3\) and \(17, 17, 3\)",
    ),
    "lengths": (
        lambda: Suspects.of([batch_of(16, 4), batch_of(16, 5)], rules()),
        r"must yield tokens of one size, got \(4,\) and \(5,\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_sources_that_cannot_be_used(name):
    make, message = BAD[name]
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_features_that_are_not_finite_are_refused():
    model = Planted()
    with torch.no_grad():
        model.colour.bias.fill_(math.nan)
    with pytest.raises(ValueError, match="image features of 600 of 600 are not finite"):
        Reader(model, rules()).images(suspects())
