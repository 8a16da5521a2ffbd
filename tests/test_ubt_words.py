"""UBT-style stage D: captions as words, and which of them are suspicious."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from clip_models import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize
from ubt_world import (
    COLOURS,
    WORDS,
    Planted,
    WordTokenizer,
    captioned,
    planted_pairs,
    rules,
)

from pybackdoor.ubt.localise import localise
from pybackdoor.ubt.reading import Reader
from pybackdoor.ubt.suspects import Suspects
from pybackdoor.ubt.words import Word, WordReader, WordTable

PAIRS, TRUTH = planted_pairs()


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
    every, model = Suspects.of(PAIRS, rules()), Planted()
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


@given(
    st.lists(st.lists(st.integers(0, 6), max_size=6), min_size=1, max_size=12),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_a_table_of_words_counts_and_finds_as_one_by_one(captions, seed):
    class Reader:
        def words(self, row):
            return [Word(f"k{token}", f"t{token}", i, i + 1) for i, token in enumerate(row)]

    table = WordTable.of(Reader(), captions)
    rng = np.random.default_rng(seed)
    times = rng.integers(0, 5, len(captions))
    count = table.captions_with(times)
    value = rng.choice([1.0, 2.0, 3.0, np.inf], len(table.keys))
    first = table.first_of_least(value)
    for at, caption in enumerate(captions):
        own = table.words_of(at)
        assert [table.keys[n] for n in own] == [f"k{token}" for token in caption]
        assert [table.texts[n] for n in own] == [f"t{token}" for token in caption]
        finite = [n for n in own if np.isfinite(value[n])]
        wanted = min(finite, key=lambda n: value[n]) if finite else -1
        assert first[at] == wanted
    for n, key in enumerate(table.keys):
        held = [int(key[1:]) in caption for caption in captions]
        assert count[n] == times[held].sum()
