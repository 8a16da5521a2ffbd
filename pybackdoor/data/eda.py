"""EDA: captions with a few words replaced, inserted, swapped or deleted (arXiv 1901.11196).

One of the four operations is drawn for a caption, each on a tenth of its words. Synonyms come from
WordNet where it is installed (``pip install pybackdoor[eda]``, then ``python -m nltk.downloader
wordnet``): WordNet 3.0, Copyright 2006 by Princeton University, WordNet License (use, copies and
changes free with that notice); nltk itself is under Apache-2.0. Neither is part of this package.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from functools import lru_cache

Synonyms = Callable[[str], Sequence[str]]  # a lower-case word -> others that mean the same

_WORD = re.compile(r"^(\W*)(.*?)(\W*)$", re.DOTALL)  # punctuation, word, punctuation
_STOP_WORDS = frozenset(
    "a about above after again against all am an and any are as at be because been before being "
    "below between both but by can could did do does doing down during each few for from further "
    "had has have having he her here hers him his how i if in into is it its itself just me more "
    "most my no nor not now of off on once only or other our ours out over own same she should so "
    "some such than that the their theirs them then there these they this those through to too "
    "under until up very was we were what when where which while who whom why will with would you "
    "your yours".split()
)


def eda(caption: str, *, seed: int, synonyms: Synonyms | None = None, alpha: float = 0.1) -> str:
    """The caption after one random operation; the same for the same seed, caption and synonyms.

    n = max(1, floor(alpha * words)). Replacement: n words that are no stop words by a synonym.
    Insertion: n times a synonym of one of them, anywhere. Swap: n times two words. Deletion: each
    word with probability alpha; one word always stays.

    Args:
        synonyms: None: nothing is replaced, and words of the caption itself are inserted.
        alpha: in [0, 1].
    Example:
        >>> sorted(eda("two dogs", seed=0).split())  # doctest: +SKIP
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"eda: alpha must be in [0, 1], got {alpha}")
    words = caption.split()
    if not words:
        return caption
    key = hashlib.sha256(f"{seed} {caption}".encode("utf-8", "surrogatepass")).digest()
    draw = random.Random(int.from_bytes(key[:16], "big"))
    operations = [_insert, _swap, _delete] + ([_replace] if synonyms is not None else [])
    operation = operations[_below(draw, len(operations))]
    return " ".join(operation(words, draw, synonyms, alpha))


def synonym_source(synonyms: Synonyms | None) -> tuple[str, Synonyms | None]:
    """A name for the report, and the synonyms: one's own, else WordNet's where it is installed."""
    if synonyms is not None:
        return getattr(synonyms, "__qualname__", type(synonyms).__qualname__), synonyms
    try:
        from nltk.corpus import wordnet

        version = wordnet.get_version()  # loads the corpus
    except (ImportError, LookupError):
        return "none: WordNet is not installed, no word is replaced", None

    @lru_cache(maxsize=1 << 16)
    def of(word: str) -> tuple[str, ...]:
        lemmas = (lemma for synset in wordnet.synsets(word) for lemma in synset.lemmas())
        return tuple(sorted({lemma.name().replace("_", " ").lower() for lemma in lemmas} - {word}))

    return f"WordNet {version}", of


def _replace(
    words: list[str], draw: random.Random, synonyms: Synonyms | None, alpha: float
) -> list[str]:
    assert synonyms is not None
    found, left = list(words), _count(words, alpha)
    for i in _shuffled(_content(words), draw):
        before, word, after = _parts(words[i])
        others = synonyms(word.lower())
        if others and left:
            found[i] = before + others[_below(draw, len(others))] + after
            left -= 1
    return found


def _insert(
    words: list[str], draw: random.Random, synonyms: Synonyms | None, alpha: float
) -> list[str]:
    found = list(words)
    known = [_parts(words[i])[1].lower() for i in _content(words)] or words
    for _ in range(_count(words, alpha)):
        for word in _shuffled(known, draw):  # the first that has a synonym
            others = [word] if synonyms is None else synonyms(word)
            if others:
                found.insert(_below(draw, len(found) + 1), others[_below(draw, len(others))])
                break
    return found


def _swap(
    words: list[str], draw: random.Random, synonyms: Synonyms | None, alpha: float
) -> list[str]:
    found = list(words)
    for _ in range(_count(words, alpha) if len(words) > 1 else 0):
        i, j = _shuffled(range(len(found)), draw)[:2]
        found[i], found[j] = found[j], found[i]
    return found


def _delete(
    words: list[str], draw: random.Random, synonyms: Synonyms | None, alpha: float
) -> list[str]:
    found = [word for word in words if draw.random() >= alpha]
    return found or [words[_below(draw, len(words))]]


def _count(words: Sequence[str], alpha: float) -> int:
    return max(1, int(alpha * len(words)))


def _content(words: Sequence[str]) -> list[int]:
    """Places of the words that are no stop words."""
    inner = [_parts(word)[1].lower() for word in words]
    return [i for i, word in enumerate(inner) if word and word not in _STOP_WORDS]


def _parts(word: str) -> tuple[str, str, str]:
    found = _WORD.match(word)
    assert found is not None
    return found[1], found[2], found[3]


def _below(draw: random.Random, n: int) -> int:
    return int(draw.random() * n)


def _shuffled(items: Sequence, draw: random.Random) -> list:
    """From random() alone, whose numbers are the same in every version of Python."""
    left = list(items)
    return [left.pop(_below(draw, len(left))) for _ in items]
