"""Stage D: which words of the suspicious captions carry the suspicion.

Two signs: what a word does for the pair's cosine (leave-one-out), and how much more often it stands
in suspicious captions than in all (log-odds).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .reading import Reader
from .suspects import Suspects
from .words import Word, WordReader

_KNOWN = 1 << 16  # captions of which it is remembered
_ENRICHED = 3.0  # standard errors above 0 at which a word counts as enriched; many are tried


@dataclass(frozen=True)
class Token:
    """A word of the suspicious captions.

    Attributes:
        text: the word.
        log_odds: of its standing in a suspicious caption, against all captions, in nats.
        error: standard error of log_odds.
        gain: mean loss of cosine without it, over the suspicious captions that hold it.
        captions, kept: suspicious captions that hold it, and in which it was kept.
    """

    text: str
    log_odds: float
    error: float
    gain: float
    captions: int
    kept: int

    @property
    def enriched(self) -> bool:
        """Whether it is kept somewhere, and its log-odds exceed 0 by three standard errors."""
        return self.kept > 0 and self.log_odds > _ENRICHED * self.error


@dataclass(frozen=True, eq=False)
class Localisation:
    """The suspicious words of k captions.

    Attributes:
        words: of each caption, in order.
        kept: [words] bool of each caption.
        portions: [k, L] tokens: each caption's kept words alone, t̂.
        tokens: the different words, the most enriched first.
        mentions: tells which captions hold an enriched word.
        whole: False where the tokenizer has no word marks, so that words are single tokens.
    """

    words: list[list[Word]]
    kept: list[np.ndarray]
    portions: Tensor
    tokens: list[Token]
    mentions: Mentions
    whole: bool


def localise(
    reader: Reader,
    suspects: Suspects,
    chosen: np.ndarray,  # [k] rows, D_sus
    *,
    share: float = 0.3,
    image: Tensor | None = None,  # [k, D] unit rows of the chosen images
) -> Localisation:
    """Keep the most suspicious share of the words of each chosen caption, at least one.

    A word's suspicion is g/σ(g) + l/σ(l): its leave-one-out gain g and its log-odds l, each in
    units of its standard deviation over all words of the chosen captions. A caption without a word
    is kept whole.

    Args:
        reader: of the model that was trained on the pairs.
        share: rho, in (0, 1].
        image: where they are known already.
    """
    check_share(share)
    split = WordReader(suspects.tokenizer)
    rows = suspects.tokens(chosen)
    words = [split.words(row) for row in rows]
    image = reader.images(suspects, chosen) if image is None else image
    gains = leave_one_out(reader, split, rows, words, image)
    odds = _Odds(split, suspects, chosen)
    every = [[odds.log_odds(w.key)[0] for w in caption] for caption in words]
    spread_g, spread_l = (_spread(np.concatenate([*values, []])) for values in (gains, every))
    kept = []
    for g, log_odds in zip(gains, every, strict=True):
        kept.append(keep_top(g / spread_g + np.array(log_odds) / spread_l, share))
    tokens = _tokens(words, kept, gains, odds)
    found = {key for key, token in tokens.items() if token.enriched}
    return Localisation(
        words, kept, portions(split, rows, words, kept),
        sorted(tokens.values(), key=lambda t: (-t.log_odds, t.text)),
        Mentions(split, found), split.whole,
    )  # fmt: skip


def check_share(share: float, name: str = "token_share") -> None:
    """Refuse what is no share of a caption's words or an image's cells."""
    if not 0 < share <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {share}")


def keep_top(score: np.ndarray, share: float) -> np.ndarray:
    """[n] bool: the share of [n] scores that is highest, rounded up; at least one where n > 0."""
    count = max(1, math.ceil(share * len(score) - 1e-9))
    keep = np.zeros(len(score), bool)
    keep[np.argsort(-score, kind="stable")[:count]] = True
    return keep


class Mentions:
    """Which captions hold one of some words."""

    def __init__(self, split: WordReader, words: set[str]) -> None:
        self._split, self._words = split, words
        self._known = lru_cache(_KNOWN)(self._one)

    def __call__(self, tokens: Tensor) -> Tensor:  # [n, L]
        """[n] bool."""
        known = [self._known(tuple(row)) for row in tokens.tolist()]
        return torch.tensor(known, dtype=torch.bool, device="cpu")

    def _one(self, row: tuple[int, ...]) -> bool:
        return any(w.key in self._words for w in self._split.words(torch.tensor(row, device="cpu")))


def leave_one_out(
    reader: Reader,
    split: WordReader,
    rows: Tensor,  # [k, L]
    words: Sequence[Sequence[Word]],
    image: Tensor,  # [k, D] unit rows
) -> list[np.ndarray]:
    """g_j = cos(φ(x), ψ(t)) - cos(φ(x), ψ(t without word j)) of each caption's words; fp64."""
    shorter = [split.without(row, w) for row, own in zip(rows, words, strict=True) for w in own]
    owner = np.repeat(np.arange(len(rows)), [len(own) for own in words])
    whole = (image * reader.tokens(rows)).sum(-1).double()
    if not shorter:
        return [np.empty(0) for _ in words]
    cut = (image[owner] * reader.tokens(torch.stack(shorter))).sum(-1).double()
    gain = (whole[owner] - cut).numpy()
    return np.split(gain, np.cumsum([len(own) for own in words])[:-1])


def portions(
    split: WordReader,
    rows: Tensor,  # [k, L]
    words: Sequence[Sequence[Word]],
    kept: Sequence[np.ndarray],
) -> Tensor:
    """[k, L] tokens of the kept words alone."""
    return torch.stack(
        [
            split.only(row, [w for w, keep in zip(own, keeps, strict=True) if keep])
            for row, own, keeps in zip(rows, words, kept, strict=True)
        ]
    )


class _Odds:
    """In how many captions a word stands: of the chosen pairs, and of all."""

    def __init__(self, split: WordReader, suspects: Suspects, chosen: np.ndarray) -> None:
        used, self._caption = np.unique(suspects.caption, return_inverse=True)
        self._sets = [{w.key for w in split.words(row)} for row in suspects.different.tokens(used)]
        self._all = self._count(np.bincount(self._caption))
        self._in = self._count(np.bincount(self._caption[chosen], minlength=len(used)))
        self._n, self._k = len(suspects), len(chosen)

    def _count(self, times: np.ndarray) -> Counter[str]:
        found: Counter[str] = Counter()
        for words, count in zip(self._sets, times.tolist(), strict=True):
            if count:
                for word in words:
                    found[word] += count
        return found

    def log_odds(self, word: str) -> tuple[float, float]:
        """(log-odds, standard error) with half a caption added everywhere (Haldane, Anscombe)."""
        cells = [
            self._in[word], self._k - self._in[word], self._all[word], self._n - self._all[word]
        ]  # fmt: skip
        a, b, c, d = (x + 0.5 for x in cells)
        return math.log(a / b) - math.log(c / d), math.sqrt(1 / a + 1 / b + 1 / c + 1 / d)


def _spread(values: np.ndarray) -> float:
    """Standard deviation; 1 where all are equal, so that they decide nothing."""
    spread = float(values.std()) if len(values) else 0.0
    return spread if spread > 0 else 1.0


def _tokens(
    words: Sequence[Sequence[Word]],
    kept: Sequence[np.ndarray],
    gains: Sequence[np.ndarray],
    odds: _Odds,
) -> dict[str, Token]:
    text: dict[str, str] = {}
    seen: dict[str, list[tuple[float, bool]]] = {}
    captions: Counter[str] = Counter()
    for own, keeps, gain in zip(words, kept, gains, strict=True):
        captions.update({w.key for w in own})
        for word, keep, g in zip(own, keeps, gain, strict=True):
            text[word.key] = word.text
            seen.setdefault(word.key, []).append((float(g), bool(keep)))
    found = {}
    for key, entries in seen.items():
        value, error = odds.log_odds(key)
        mean = sum(g for g, _ in entries) / len(entries)
        held = sum(keep for _, keep in entries)
        found[key] = Token(text[key], value, error, mean, captions[key], held)
    return found
