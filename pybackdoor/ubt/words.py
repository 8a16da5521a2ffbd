"""Captions as words: which tokens of a row belong together, and rows made of some of the words."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_END, _STARTS, _CONTINUES = "</w>", ("Ġ", "▁"), "##"
_SAMPLE = "a photograph of something unbelievable"


@dataclass(frozen=True)
class Word:
    """One word of a caption.

    Attributes:
        key: equal for equal words; the token ids, joined.
        text: for people.
        start, stop: its columns in the row of tokens.
    """

    key: str
    text: str
    start: int
    stop: int


class WordReader:
    """Groups the tokens of a row into words, and puts rows together from some of the words.

    Words are found by the marks that the tokenizer's vocabulary has: CLIP's ``</w>`` at an end,
    ``Ġ`` or ``▁`` at a start, ``##`` within. Without such marks every token is a word of its own.
    Start, end and padding tokens are those that the empty caption consists of; where the tokenizer
    is unknown or refuses it, only the run of equal tokens that ends a row is taken for padding.

    Attributes:
        whole: whether tokens are grouped into words.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._pieces = _pieces_of(tokenizer)
        self._style = _style(tokenizer, self._pieces)
        self.whole = self._style is not None
        empty = _empty(tokenizer)
        self._special = set() if empty is None else set(empty.tolist())
        self._texts: dict[tuple[int, ...], str] = {}  # decoding costs more than all else
        self._padding = None if empty is None else int(empty[-1])

    def words(self, row: Tensor) -> list[Word]:  # [L] int64
        """The words of one caption, in order; without start, end and padding."""
        ids = row.tolist()
        inner = self._inner(ids)
        groups: list[list[int]] = []
        fresh = True
        for at in inner:
            piece = "" if self._pieces is None else self._pieces(ids[at])
            begins = {
                "end": fresh,
                "start": piece.startswith(_STARTS),
                "continue": not piece.startswith(_CONTINUES),
                None: True,
            }[self._style]
            if begins or not groups or groups[-1][-1] != at - 1:
                groups.append([at])
            else:
                groups[-1].append(at)
            fresh = piece.endswith(_END)
        return [
            Word(" ".join(str(ids[at]) for at in g), self._text([ids[at] for at in g]), g[0],
                 g[-1] + 1)
            for g in groups
        ]  # fmt: skip

    def without(self, row: Tensor, word: Word) -> Tensor:  # [L]
        """[L] the caption without one word: what follows moves up, padding fills the end."""
        return self._filled(torch.cat([row[: word.start], row[word.stop :]]), len(row), row)

    def only(self, row: Tensor, kept: Sequence[Word]) -> Tensor:  # [L]
        """[L] the caption's start and end around some of its words, in their order."""
        inner = self._inner(row.tolist())
        if not inner:
            return row.clone()
        keep = torch.zeros(len(row), dtype=torch.bool, device=row.device)
        keep[: inner[0]] = True
        keep[inner[-1] + 1 :] = True
        for word in kept:
            keep[word.start : word.stop] = True
        return self._filled(row[keep], len(row), row)

    def _filled(self, kept: Tensor, length: int, row: Tensor) -> Tensor:
        padding = row[-1:] if self._padding is None else row.new_tensor([self._padding])
        return torch.cat([kept, padding.expand(length - len(kept))])

    def _inner(self, ids: list[int]) -> list[int]:
        """Columns of the words' tokens."""
        if self._special:
            plain = [at for at, token in enumerate(ids) if token not in self._special]
            return list(range(plain[0], plain[-1] + 1)) if plain else []
        end = len(ids)  # where the run that ends the row begins
        while end > 1 and ids[end - 1] == ids[end - 2]:
            end -= 1
        return list(range(end - 1 if end < len(ids) else end))

    def _text(self, ids: list[int]) -> str:
        key = tuple(ids)
        if key not in self._texts:
            inner, plain = _inside(self._tokenizer), " ".join(map(str, ids))
            decodes = self._pieces is not None and hasattr(inner, "decode")
            self._texts[key] = (inner.decode(ids).strip() if decodes else "") or plain
        return self._texts[key]


@dataclass(frozen=True)
class WordTable:
    """The words of many captions as numbers, a few bytes each: a caption's lie end to end.

    Attributes:
        keys, texts: of each of the W different words, in the order of their first appearance.
        number: [M] int32, the words of all captions.
        ends: [N] int64, where each caption's words end in ``number``.
    """

    keys: list[str]
    texts: list[str]
    number: np.ndarray
    ends: np.ndarray

    @staticmethod
    def of(reader: WordReader, rows: Iterable[Tensor]) -> WordTable:  # [L] int64 each
        numbers: dict[str, int] = {}
        texts: list[str] = []
        found, ends = array("i"), array("q")
        for row in rows:
            for word in reader.words(row):
                if word.key not in numbers:
                    numbers[word.key] = len(numbers)
                    texts.append(word.text)
                found.append(numbers[word.key])
            ends.append(len(found))
        return WordTable(list(numbers), texts, np.array(found, np.int32), np.array(ends, np.int64))

    def words_of(self, caption: int) -> np.ndarray:
        """[m] numbers of one caption's words, in order."""
        return self.number[self.ends[caption - 1] if caption else 0 : self.ends[caption]]

    def captions_with(self, times: np.ndarray) -> np.ndarray:  # [N] how often each caption counts
        """[W] captions that hold each word, a word that comes twice in one counted once."""
        pairs = np.unique(self._caption() * len(self.keys) + self.number)
        caption, word = np.divmod(pairs, max(len(self.keys), 1))
        found = np.zeros(len(self.keys), np.int64)
        np.add.at(found, word, times[caption])
        return found

    def first_of_least(self, value: np.ndarray) -> np.ndarray:  # [W]
        """[N] each caption's first word of the least value; -1 where none is finite."""
        found = np.full(len(self.ends), -1, np.int64)
        caption, own = self._caption(), value[self.number]
        order = np.lexsort((np.arange(len(own)), own, caption))
        first = order[np.r_[True, np.diff(caption[order]) > 0][: len(order)]]
        first = first[np.isfinite(own[first])]
        found[caption[first]] = self.number[first]
        return found

    def _caption(self) -> np.ndarray:
        """[M] int64, whose word each is."""
        sizes = np.diff(self.ends, prepend=0)
        return np.repeat(np.arange(len(self.ends), dtype=np.int64), sizes)


def _inside(tokenizer: Any | None) -> Any:
    """The tokenizer that knows its vocabulary, below our own and open_clip's wrappers."""
    inner = getattr(tokenizer, "inner", tokenizer)
    return getattr(inner, "tokenizer", inner)


def _pieces_of(tokenizer: Any | None) -> Callable[[int], str] | None:
    """Token id -> its piece of text with marks; None where the tokenizer does not tell."""
    inner = _inside(tokenizer)
    if hasattr(inner, "convert_ids_to_tokens"):
        return lambda token: inner.convert_ids_to_tokens([token])[0] or ""
    decoder = getattr(inner, "decoder", None)
    if isinstance(decoder, dict):
        return lambda token: decoder.get(token, "")
    return None


def _style(tokenizer: Any | None, pieces: Callable[[int], str] | None) -> str | None:
    if pieces is None:
        return None
    shown = [pieces(token) for token in tokenizer([_SAMPLE])[0].tolist()]  # type: ignore[misc]
    if any(piece.endswith(_END) for piece in shown):
        return "end"
    if any(piece.startswith(_STARTS) for piece in shown):
        return "start"
    return "continue" if any(piece.startswith(_CONTINUES) for piece in shown) else None


def _empty(tokenizer: Any | None) -> np.ndarray | None:
    """[L] the tokens of the empty caption."""
    if tokenizer is None:
        return None
    try:
        row = tokenizer([""])[0]
        return row.numpy(force=True) if isinstance(row, Tensor) else np.asarray(row)
    except Exception:  # a tokenizer of the user's own may refuse it
        return None
