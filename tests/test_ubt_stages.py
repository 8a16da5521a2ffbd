"""UBT-style stages A to D, each against numbers worked out another way."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from clip_models import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize
from ubt_world import (
    COLOURS,
    MEAN,
    STD,
    WORDS,
    Given,
    Planted,
    WordTokenizer,
    captioned,
    planted_pairs,
    rules,
)

from pybackdoor.batches import InputRules
from pybackdoor.data import PairLoader
from pybackdoor.ubt.gate import (
    caption_classes,
    centred,
    check_gate,
    cohesion,
    gate,
    matched_sets,
    top,
)
from pybackdoor.ubt.localise import localise
from pybackdoor.ubt.overfit import MeanCosine, overfit
from pybackdoor.ubt.reading import ImageRows, Reader, pair_cosines
from pybackdoor.ubt.suspects import RowLoader, Suspects
from pybackdoor.ubt.weak import priorities, weak_pool
from pybackdoor.ubt.words import WordReader

CPU = torch.device("cpu")
PAIRS, TRUTH = planted_pairs()


def suspects(pairs=PAIRS):
    return Suspects.of(pairs, rules())


def unit(n, d, seed=0):
    g = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=-1)


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


def test_cohesion_and_centring_by_loops():
    x = unit(40, 6)
    rows = x[:9]
    wanted = np.mean([float(rows[i] @ rows[j]) for i in range(9) for j in range(9) if i != j])
    assert math.isclose(cohesion(rows), wanted, abs_tol=1e-12)
    classes = np.array([0] * 20 + [1] * 15 + [2] * 5)
    found = centred(x, classes)
    for i in range(40):
        same = [j for j in range(40) if classes[j] == classes[i]]
        wanted = normalize(x[i] - x[same].mean(0), dim=-1)
        torch.testing.assert_close(found[i], wanted, rtol=0, atol=1e-12)


def test_classes_are_the_rarest_common_words():
    every = captioned(
        *["a photo of a red square"] * 3, *["a photo of the blue square"] * 2, "one red photo"
    )
    classes, names = caption_classes(every, least=3)
    whole = "3 4 5 3 8 11"  # the ids of the words; the last one's rarest common word is red
    assert [names[c] for c in classes] == [whole] * 3 + ["3", "3", "8"]
    classes, names = caption_classes(every, least=7)
    assert set(classes) == {0} and names == ["(rare words only)"]


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


@given(st.integers(2, 30), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_matched_sets_have_the_classes_of_the_chosen(k, kinds, seed):
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, kinds, 60)
    chosen = rng.choice(60, k, replace=False)
    for drawn in matched_sets(classes, chosen, 3, seed):
        assert len(set(drawn.tolist())) == k
        assert (
            np.bincount(classes[drawn], minlength=5).tolist()
            == np.bincount(classes[chosen], minlength=5).tolist()
        )


def test_gate_fires_on_poison_and_not_on_random_pairs():
    every = suspects()
    image = ImageRows(Reader(Planted(), rules()), every)
    poison = np.flatnonzero(TRUTH)
    fired = gate(image, every, poison, sets=199)
    assert fired.fires and fired.p == 1 / 200 and fired.statistic - fired.matched > 0.3
    assert "gate fires" in fired.describe() and sum(n for _, n in fired.classes) == 40
    classes, _ = caption_classes(every)
    rows = centred(image.all(), classes)
    sets = [cohesion(rows[d]) for d in map(torch.from_numpy, matched_sets(classes, poison, 199, 0))]
    assert math.isclose(fired.matched, np.mean(sets)) and math.isclose(fired.spread, np.std(sets))
    asked = []

    class Watched(ImageRows):
        def at(self, rows):
            asked.extend(classes[rows])
            return super().at(rows)

    few = poison[classes[poison] == classes[poison[0]]][::-1].copy()  # unsorted
    own = gate(Watched(Reader(Planted(), rules()), every), every, few, sets=9, alpha=0.1)
    assert set(asked) == {classes[poison[0]]}
    assert math.isclose(own.statistic, cohesion(rows[torch.from_numpy(few)]))
    chance = gate(image, every, np.flatnonzero(~TRUTH)[::14], sets=199)
    assert not chance.fires and "does not fire" in chance.describe()
    assert not gate(image, every, poison, sets=199, excess=1.5).fires  # a p-value alone is too easy
    for bad in ((99, 0.001, 0, 0.5), (99, 0, 0, 0.5), (99, 0.05, 3, 0.5), (99, 0.05, 0, 2)):
        with pytest.raises(ValueError, match="gate_"):
            check_gate(*bad)


@pytest.mark.parametrize("size", [64, 200])
def test_p_is_as_rare_as_it_says_where_nothing_is_planted(size):
    g = torch.Generator().manual_seed(0)
    every = captioned(*[f"a photo of a {c} square" for c in ("red", "blue")] * (size // 2))
    image = Given(normalize(torch.randn(size, 16, generator=g) + 2 * torch.eye(16)[0], dim=-1))
    rng = np.random.default_rng(0)
    p = [
        gate(image, every, rng.choice(size, 30, replace=False), sets=39, alpha=0.05, seed=i).p
        for i in range(200)
    ]
    for level in (0.05, 0.25, 0.5):
        assert abs(np.mean(np.array(p) <= level) - level) < 4 * math.sqrt(level * (1 - level) / 200)


def test_top_takes_the_largest_and_no_nan():
    scores = np.array([1.0, np.nan, 3.0, 3.0, -1.0])
    assert top(scores, 3).tolist() == [2, 3, 0]
    with pytest.raises(ValueError, match=r"k must be in .2, 4., .*got 5"):
        top(scores, 5)


class Pieces:
    """A tokenizer whose vocabulary has marks: one id for each piece of a text split at |."""

    def __init__(self, *pieces):
        self.vocabulary = ["<pad>", "<s>", "</s>", *pieces]

    def __call__(self, texts):
        rows = torch.zeros(len(texts), 8, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            own = [p for p in text.split("|") if p in self.vocabulary]
            ids = [1, *map(self.vocabulary.index, own or self.vocabulary[3:] if text else []), 2]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def convert_ids_to_tokens(self, ids):
        return [self.vocabulary[i] for i in ids]


@pytest.mark.parametrize(
    "pieces, whole",
    [
        (("foot", "ball</w>", "red</w>"), True),
        (("Ġfoot", "ball", "Ġred"), True),
        (("▁foot", "ball", "▁red"), True),
        (("foot", "##ball", "red"), True),
        (("foot", "ball", "red"), False),
    ],
)
def test_words_follow_the_vocabularys_marks(pieces, whole):
    split = WordReader(Pieces(*pieces))
    row = Pieces(*pieces)(["|".join(pieces)])[0]
    words = split.words(row)
    assert split.whole == whole
    spans = [(1, 3), (3, 4)] if whole else [(1, 2), (2, 3), (3, 4)]
    assert [(w.start, w.stop) for w in words] == spans
    last = split.without(row, words[0]).tolist()
    assert last == ([1, 5, 2, 0, 0, 0, 0, 0] if whole else [1, 4, 5, 2, 0, 0, 0, 0])
    assert (
        split.only(row, words[:1]).tolist() == ([1, 3, 4, 2] if whole else [1, 3, 2, 0]) + [0] * 4
    )


def test_words_of_clips_own_tokenizer():
    tokenizer = tiny().tokenizer
    split = WordReader(tokenizer)
    rows = tokenizer(
        ["a photo of an unbelievableness", "日本語 の 写真", "wow ! yes", "", "x " * 40]
    )
    words = [split.words(row) for row in rows]
    assert [w.text for w in words[0]] == ["a", "photo", "of", "an", "unbelievableness"]
    assert [w.text for w in words[1]] == ["日本語", "の", "写真"]
    assert [w.text for w in words[2]] == ["wow", "!", "yes"] and words[3] == []
    same = tokenizer(["a photo of unbelievableness", "unbelievableness"])
    assert torch.equal(split.without(rows[0], words[0][3]), same[0])
    assert torch.equal(split.only(rows[0], words[0][4:]), same[1])
    assert torch.equal(split.only(rows[3], []), rows[3])
    cut = split.without(rows[4], words[4][0])  # no padding was left to shift in
    assert len(words[4]) == 14 and cut.tolist() == rows[4].tolist()[:14] + [49407, 0]
    assert len({w.key for w in words[4]}) == 1


def test_words_without_a_tokenizer_end_at_the_padding():
    def refuses(texts):
        raise ValueError("no empty captions")

    for tokenizer in (None, refuses):
        split = WordReader(tokenizer)
        assert not split.whole
        assert [w.text for w in split.words(torch.tensor([5, 6, 7, 0, 0]))] == ["5", "6", "7"]
        assert [w.text for w in split.words(torch.tensor([5, 6, 7]))] == ["5", "6", "7"]
        row = torch.tensor([5, 6, 0, 0])
        assert split.without(row, split.words(row)[0]).tolist() == [6, 0, 0, 0]


@pytest.mark.parametrize("share, kept", [(0.3, 2), (0.01, 1), (1.0, 5)])
def test_localisation_by_hand(share, kept):
    every, model = suspects(), Planted()
    chosen = np.flatnonzero(TRUTH)
    found = localise(Reader(model, rules()), every, chosen, share=share)
    wide = Planted().double()
    x = (every.pixels(chosen).permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.5
    image = normalize(wide.encode_image(x), dim=-1).detach()
    tokenizer, of_word = WordTokenizer(), {}
    for i, row in enumerate(chosen):
        words = PAIRS.captions[int(row)].split()
        assert [w.text for w in found.words[i]] == [str(t) for t in tokenizer([" ".join(words)])[0]
                                                    .tolist()[1 : len(words) + 1]]  # fmt: skip

        @torch.no_grad()
        def cosine(text, i=i):
            features = wide.encode_text(tokenizer([text]))
            return float(normalize(features, dim=-1)[0] @ image[i])

        for j in range(len(words)):
            rest = words[:j] + words[j + 1 :]
            gain = cosine(" ".join(words)) - cosine(" ".join(rest))
            of_word.setdefault(words[j], []).append(gain)
        if len(words) == 5:
            assert found.kept[i].sum() == kept
        own = [w for w, keep in zip(words, found.kept[i], strict=True) if keep]
        assert torch.equal(found.portions[i], tokenizer([" ".join(own)])[0])
    held = [set(c.split()) for c in PAIRS.captions]
    blue = next(t for t in found.tokens if t.text == "10")  # the id of blue
    a, b = sum("blue" in held[i] for i in chosen) + 0.5, sum("blue" not in held[i] for i in chosen)
    c, d = sum("blue" in h for h in held) + 0.5, sum("blue" not in h for h in held) + 0.5
    b += 0.5
    assert math.isclose(blue.log_odds, math.log(a / b / (c / d)))
    assert math.isclose(blue.error, math.sqrt(1 / a + 1 / b + 1 / c + 1 / d))
    assert blue.gain == pytest.approx(np.mean(of_word["blue"]), abs=1e-6)
    assert blue.captions == blue.kept == 40 and blue.enriched and found.tokens[0] is blue
    says = found.mentions(every.tokens(np.arange(600)))
    enriched = {t.text for t in found.tokens if t.enriched}
    assert enriched == {t.text for t in found.tokens if t.kept and t.log_odds > 3 * t.error}
    ids = [{str(WORDS.index(w)) for w in h} for h in held]
    assert says.tolist() == [bool(i & enriched) for i in ids]


def test_captions_of_one_word_are_kept_whole():
    every = captioned(*COLOURS, "red", "blue")
    found = localise(Reader(Planted(), rules()), every, np.array([0, 2, 4]))
    assert torch.equal(found.portions, every.tokens(np.array([0, 2, 4])))
    assert all(k.tolist() == [True] for k in found.kept)
    with pytest.raises(ValueError, match="token_share must be in"):
        localise(Reader(Planted(), rules()), every, np.array([0]), share=1.5)


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
        "must yield uint8 images",
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
