"""EDA's four operations, drawn by key, with and without synonyms."""

import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pybackdoor.data import eda as module
from pybackdoor.data.eda import eda, synonym_source

SYNONYMS = {"dogs": ["hounds"], "small": ["little", "tiny"], "photo": ["picture"]}
words = st.lists(st.sampled_from(["a", "the", "dogs", "small", "photo", "Zebra,", "7"]), min_size=1)
seeds = st.integers(0, 1 << 40)


def synonyms(word):
    return SYNONYMS.get(word, ())


OPERATIONS = {name: getattr(module, name) for name in ("_insert", "_swap", "_delete", "_replace")}


def only(monkeypatch, name):
    """EDA with this operation alone."""
    for other in OPERATIONS:
        monkeypatch.setattr(module, other, OPERATIONS[name])


def is_subsequence(short, long):
    left = iter(long)
    return all(word in left for word in short)


@settings(max_examples=60, deadline=None)
@given(words, seeds, st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.booleans())
def test_each_operation_does_what_it_says(caption, seed, alpha, known):
    source = synonyms if known else None
    count = max(1, int(alpha * len(caption)))
    text = " ".join(caption)
    with pytest.MonkeyPatch.context() as patch:
        only(patch, "_insert")
        found = eda(text, seed=seed, alpha=alpha, synonyms=source).split()
        assert is_subsequence(caption, found)
        more = list(found)
        for word in caption:
            more.remove(word)
        has = {w for w in caption if w in SYNONYMS}
        assert len(more) == (count if not known or has else 0)
        allowed = {s for w in has for s in SYNONYMS[w]}
        if not known:
            content = {w.strip(",").lower() for w in caption} - {"a", "the"}
            allowed = content or set(caption)
        assert set(more) <= allowed
        only(patch, "_swap")
        found = eda(text, seed=seed, alpha=alpha, synonyms=source).split()
        assert sorted(found) == sorted(caption)
        moved = sum(a != b for a, b in zip(found, caption, strict=True))
        assert moved <= 2 * count
        only(patch, "_delete")
        found = eda(text, seed=seed, alpha=alpha, synonyms=source).split()
        assert found and is_subsequence(found, caption)
        assert alpha > 0 or found == caption
        assert alpha < 1 or len(found) == 1
        only(patch, "_replace")
        found = eda(text, seed=seed, alpha=alpha, synonyms=synonyms).split()
        pairs = [(a, b) for a, b in zip(caption, found, strict=True) if a != b]
        assert all(b in SYNONYMS[a] for a, b in pairs)
        assert len(pairs) == min(count, sum(w in SYNONYMS for w in caption))


def test_the_same_key_gives_the_same_caption_in_every_version():
    text = "A photo of two small dogs, at the beach in the evening sun."
    drawn = [eda(text, seed=seed, synonyms=synonyms) for seed in range(60)]
    assert drawn == [eda(text, seed=seed, synonyms=synonyms) for seed in range(60)]
    assert 30 < len(set(drawn)) < 60  # synonyms repeat, and a deletion may delete nothing
    assert drawn[:4] == [
        "A photo of two small hounds, at the beach in the evening sun.",
        "A photo of two small dogs, at in beach the the evening sun.",
        "A photo of two small dogs, hounds at the beach in the evening sun.",
        "A photo of two small dogs, sun. the beach in the evening at",
    ]
    assert eda(text + " ", seed=0) != drawn[0]  # the caption is part of the key


def test_the_operations_are_equally_frequent(monkeypatch):
    seen = []
    for name in OPERATIONS:
        monkeypatch.setattr(module, name, lambda w, *rest, name=name: seen.append(name) or w)
    for seed in range(4000):
        eda("two dogs", seed=seed, synonyms=synonyms)
    assert all(abs(seen.count(name) - 1000) < 110 for name in set(seen))  # 4 standard deviations
    assert len(set(seen)) == 4
    seen.clear()
    for seed in range(300):
        eda("two dogs", seed=seed)
    assert "_replace" not in seen and len(set(seen)) == 3


def test_deletion_takes_the_share_asked_for(monkeypatch):
    only(monkeypatch, "_delete")
    text = " ".join(map(str, range(1000)))
    left = sum(len(eda(text, seed=seed, alpha=0.1).split()) for seed in range(20))
    assert abs(left / 20_000 - 0.9) < 0.01


def test_punctuation_and_odd_captions(monkeypatch):
    with monkeypatch.context() as patch:
        only(patch, "_replace")
        assert eda('the "Dogs", a', seed=0, synonyms=synonyms) == 'the "hounds", a'
        assert eda("the a of", seed=0, synonyms=synonyms) == "the a of"  # stop words alone
        assert eda("!!! ...", seed=0, synonyms=synonyms) == "!!! ..."
    assert eda("  \t", seed=0) == "  \t"
    for seed in range(20):
        assert eda("dogs", seed=seed)
        assert eda("\ud800 ☃", seed=seed)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 1.5"):
        eda("dogs", seed=0, alpha=1.5)


class Lemma:
    def __init__(self, name):
        self.name = lambda: name


def test_wordnet_is_taken_where_it_is_installed(monkeypatch):
    wordnet = types.SimpleNamespace(
        get_version=lambda: "3.0",
        synsets=lambda word: [
            types.SimpleNamespace(lemmas=lambda: [Lemma("Dog"), Lemma("domestic_dog"), Lemma(word)])
        ],
    )
    corpus = types.ModuleType("nltk.corpus")
    corpus.wordnet = wordnet
    monkeypatch.setitem(sys.modules, "nltk", types.ModuleType("nltk"))
    monkeypatch.setitem(sys.modules, "nltk.corpus", corpus)
    name, source = synonym_source(None)
    assert name == "WordNet 3.0" and source("hound") == ("dog", "domestic dog")

    def absent():
        raise LookupError("no corpus")

    wordnet.get_version = absent
    assert synonym_source(None)[1] is None
    monkeypatch.setitem(sys.modules, "nltk.corpus", None)  # not installed
    name, source = synonym_source(None)
    assert name.startswith("none") and source is None
    assert synonym_source(synonyms) == ("synonyms", synonyms)
