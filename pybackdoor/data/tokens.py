"""Captions as tokens: each different caption tokenised once, kept without its padding."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .index import IndexWriter, hashed, open_index
from .strings import Strings

Tokenizer = Callable[[list[str]], Tensor]

_CHUNK = 4096  # captions a call; bounds the padded block to 1.3 MB at 77 tokens
ON_DISK = 100_000  # captions of an index from which on their tokens lie in a file
_FORMAT = 1
_PROBES = 128  # captions, twice, by which tokenizers are told apart
_HARD = ["", "Übergröße ☃ 日本", "don't  STOP\t<b>&amp;amp;</b>", "x" * 500, "1234567890 !?.,;:"]
_LENGTHS = ("context_length", "model_max_length", "vocab_size")
_NO_LIMIT = 1_000_000  # Hugging Face tokenizers without a length say 1e30


class TokenTable:
    """The tokens of a list of captions.

    Held as one flat int32 array with offsets; the run of equal tokens that ends a row (its
    padding) is stored once, which loses nothing whatever the padding token is.

    Args:
        captions: N strings; equal ones are tokenised once.
        tokenizer: list of n strings -> [n, L] integers (open_clip's form), or a Hugging Face
            tokenizer with a model_max_length.
        progress: show a bar; None = on a terminal when there is more than one chunk.
    Attributes:
        length: L.
        num_truncated: captions (counted as often as they occur) longer than L tokens; None when
            the tokenizer has no ``encode`` to tell.
    Raises:
        TypeError, ValueError: the tokenizer returns another dtype or shape.
    """

    def __init__(
        self, captions: Sequence[str], tokenizer: Any, *, progress: bool | None = None
    ) -> None:
        number: dict[str, int] = {}
        self._of_row: np.ndarray | None = np.fromiter(
            (number.setdefault(caption, len(number)) for caption in captions),
            np.int64,
            len(captions),
        )
        unique = list(number)
        encoder = _Encoder(tokenizer)
        pieces = [
            encoder(unique[start : start + _CHUNK]) for start in _chunks(len(unique), progress)
        ]
        self.length = encoder.length
        self._flat = np.concatenate([np.empty(0, np.int32), *(piece.flat for piece in pieces)])
        self._ends = np.cumsum(np.concatenate([[0], *(piece.kept for piece in pieces)]))
        self.num_truncated: int | None = None
        if encoder.counts:
            cut = np.concatenate([np.zeros(0, bool), *(piece.truncated for piece in pieces)])
            self.num_truncated = int(np.count_nonzero(cut[self._of_row]))

    @classmethod
    def on_disk(
        cls, captions: Strings, tokenizer: Any, *, progress: bool | None = None
    ) -> TokenTable:
        """The same of captions from an index file, in a file beside that, mapped into memory.

        Built once in pieces, in bounded memory; named by the captions' and the tokenizer's
        identity.

        Raises:
            OSError: the folder cannot be written.
        """
        assert captions.home is not None and captions.identity is not None
        key = hashed(_FORMAT, captions.identity, tokenizer_identity(tokenizer, captions))
        path = captions.home.with_name(f"{captions.home.stem}-{key[:16]}.tokens")

        def build(writer: IndexWriter) -> dict[str, Any]:
            try:
                return _write(writer, captions, tokenizer, np.dtype(np.uint16), progress)
            except _Wider:
                return _write(writer, captions, tokenizer, np.dtype(np.int32), progress)

        index = open_index("PairLoader", path, key, build)
        table = cls.__new__(cls)
        table._of_row = None
        kind = index.meta["dtype"]
        table._flat, table._ends = index.array(f"tokens.{kind}"), index.array(f"ends.{kind}")
        table.length, table.num_truncated = index.meta["length"], index.meta["num_truncated"]
        return table

    def __len__(self) -> int:
        return len(self._ends) - 1 if self._of_row is None else len(self._of_row)

    @property
    def different(self) -> DifferentCaptions:
        """The captions that are held, equal ones as one; those on disk each by itself."""
        return DifferentCaptions(self)

    def numbers(self, indices: np.ndarray) -> np.ndarray:
        """[n] int64 in [0, len(different)) of the captions at [n] indices."""
        return np.asarray(indices) if self._of_row is None else self._of_row[indices]

    def equal_as_one(self, captions: Sequence[str]) -> tuple[np.ndarray, DifferentCaptions]:
        """[N] numbers and what they are of: as above, but equal captions on disk are one, too.

        Args:
            captions: the ones that the table was made of.
        """
        if self._of_row is not None:
            return self._of_row, self.different
        number: dict[str, int] = {}
        of = np.array([number.setdefault(caption, len(number)) for caption in captions], np.int64)
        return of, DifferentCaptions(self, np.unique(of, return_index=True)[1])

    def take(self, indices: np.ndarray) -> Tensor:
        """[n, L] int64 tokens of the captions at [n] indices."""
        return self.different.tokens(self.numbers(indices))

    def _unpacked(self, numbers: np.ndarray) -> Tensor:
        out = np.empty((len(numbers), self.length), np.int64)
        for row, which in zip(out, numbers, strict=True):
            start, end = self._ends[which], self._ends[which + 1]
            row[: end - start] = self._flat[start:end]
            row[end - start :] = self._flat[end - 1]
        return torch.from_numpy(out)

    def rewritten(
        self, captions: Sequence[str], rewrite: Callable[[str], str], tokenizer: Any
    ) -> DifferentCaptions:
        """Tokens of the rewritten captions, by the number of the caption rewritten.

        Args:
            captions: the ones that the table was made of.
        """
        different = captions if self._of_row is None else dict.fromkeys(captions)
        other = TokenTable([rewrite(c) for c in different], tokenizer)
        return DifferentCaptions(other, other._of_row)

    def warn_if_truncated(self) -> None:
        """Say how many captions lose their end, when any do."""
        if self.num_truncated:
            warnings.warn(
                f"PairLoader: {self.num_truncated} of {len(self)} captions are longer than the "
                f"context length of {self.length} tokens and lose their end",
                UserWarning,
                stacklevel=3,
            )


class DifferentCaptions:
    """The different captions of a table, by number.

    Args:
        of: [n] int64, which of the table's a number means; None: that of the same number.
    """

    def __init__(self, table: TokenTable, of: np.ndarray | None = None) -> None:
        self._table, self._of = table, of

    def __len__(self) -> int:
        return len(self._table._ends) - 1 if self._of is None else len(self._of)

    def lengths(self) -> np.ndarray:
        """[n] tokens of each, one of its padding among them."""
        lengths = np.diff(self._table._ends)
        return lengths if self._of is None else lengths[self._of]

    def tokens(self, numbers: np.ndarray) -> Tensor:  # [b]
        """[b, L] int64."""
        return self._table._unpacked(numbers if self._of is None else self._of[numbers])


def token_table(captions: Sequence[str], tokenizer: Any, progress: bool | None) -> TokenTable:
    """The tokens, on the disk when there are many captions and they come from an index file."""
    if isinstance(captions, Strings) and captions.home and len(captions) >= ON_DISK:
        try:
            return TokenTable.on_disk(captions, tokenizer, progress=progress)
        except OSError as error:
            warnings.warn(
                f"PairLoader: the tokens are kept in memory, not beside {captions.home}: {error}",
                RuntimeWarning,
                stacklevel=4,
            )
    return TokenTable(captions, tokenizer, progress=progress)


class _Wider(Exception):
    """A token that 16 bits do not hold."""


def _write(
    writer: IndexWriter, captions: Strings, tokenizer: Any, dtype: np.dtype, progress: bool | None
) -> dict[str, Any]:
    encoder = _Encoder(tokenizer)
    kind, end, truncated = dtype.name, 0, 0
    writer.append(f"ends.{kind}", np.zeros(1, np.int64))
    for start in _chunks(len(captions), progress):
        piece = encoder(list(captions[start : start + _CHUNK]))
        if piece.flat.size and not 0 <= piece.flat.min() <= piece.flat.max() <= 0xFFFF:
            if dtype == np.uint16:
                raise _Wider
        writer.append(f"tokens.{kind}", piece.flat.astype(dtype))
        writer.append(f"ends.{kind}", end + np.cumsum(piece.kept))
        end += int(piece.kept.sum())
        truncated += int(np.count_nonzero(piece.truncated))
    return {
        "dtype": kind,
        "length": encoder.length,
        "num_truncated": truncated if encoder.counts else None,
    }


def tokenizer_identity(tokenizer: Any, captions: Sequence[str]) -> str:
    """A hash that differs between tokenizers: type, length, vocabulary, cleaning, and what they
    make of some of the captions."""
    inner = getattr(tokenizer, "tokenizer", tokenizer)  # open_clip wraps Hugging Face's
    backend = getattr(inner, "backend_tokenizer", None)
    if backend is not None:
        vocabulary: Any = backend.to_str()
    elif hasattr(inner, "encoder"):
        vocabulary = [
            sorted(inner.encoder.items()),
            sorted(getattr(inner, "bpe_ranks", {}).items()),
        ]
    else:
        vocabulary = None
    lengths = [getattr(t, n, None) for t in (tokenizer, inner) for n in _LENGTHS]
    clean = getattr(getattr(tokenizer, "clean_fn", None), "__qualname__", None)
    call = adapted(tokenizer)
    tokens = call(_probes(captions)).tolist()
    try:
        tokens += call(_HARD).tolist()
    except Exception as error:  # they are not the user's captions: it may refuse them
        tokens.append(type(error).__name__)
    kind = f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"
    name = getattr(tokenizer, "__qualname__", None)  # of a function
    return hashed(kind, name, lengths, clean, vocabulary, tokens)


def caption_told_apart(one: Any, two: Any, captions: Sequence[str]) -> str | None:
    """The first of some of the captions that two tokenizers make other tokens of, or None.

    What pads a row does not count: behind the end token no causal tower sees it, and open_clip and
    transformers pad OpenAI's vocabulary differently.
    """
    probes = _probes(captions)
    a, b = (adapted(tokenizer)(probes).numpy(force=True) for tokenizer in (one, two))  # [n, L]
    if a.shape != b.shape:
        return probes[0]
    kept = a.shape[1] - np.maximum(_padding(a), _padding(b))  # of the row whose padding is longer
    same = (a == b) | (np.arange(a.shape[1]) >= kept[:, None])
    return next((probes[row] for row in np.flatnonzero(~same.all(1))), None)


def _probes(captions: Sequence[str]) -> list[str]:
    middle = len(captions) // 2  # two runs: probes far apart would bring in half the file
    return [*captions[:_PROBES], *captions[middle : middle + _PROBES]]


@dataclass(frozen=True)
class _Piece:
    """Tokens of n captions: their rows end to end without padding, and how many of each row."""

    flat: np.ndarray  # [tokens] int32
    kept: np.ndarray  # [n] int64
    truncated: np.ndarray  # [n] bool; False where it cannot be told


class _Encoder:
    """A tokenizer whose answers are checked. Equal captions of a call are tokenised once."""

    def __init__(self, tokenizer: Any) -> None:
        self._call, self._encoded_length = adapted(tokenizer), _encoded_length(tokenizer)
        self.length = 0
        self.counts = self._encoded_length is not None

    def __call__(self, texts: list[str]) -> _Piece:
        number: dict[str, int] = {}
        of = np.array([number.setdefault(text, len(number)) for text in texts], np.int64)
        unique = list(number)
        tokens = self._checked(self._call(unique), len(unique))
        kept = tokens.shape[1] - _padding(tokens)  # [n] tokens to keep
        truncated = np.zeros(len(unique), bool)
        if self._encoded_length is not None:
            # A row that ends in padding was not cut; only the others are encoded again.
            for i in np.flatnonzero(kept == tokens.shape[1]):
                truncated[i] = self._encoded_length(unique[i]) > tokens.shape[1]
        flat = tokens[of][np.arange(tokens.shape[1]) < kept[of][:, None]]
        return _Piece(flat, kept[of], truncated[of])

    def _checked(self, tokens: Any, count: int) -> np.ndarray:
        """[count, L] int32, L as in the chunks before."""
        if not isinstance(tokens, Tensor) or tokens.is_floating_point():
            got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise TypeError(f"PairLoader: tokenizer must return an integer tensor, got {got}")
        shape = list(tokens.shape)
        wanted = [count, self.length or "L"]
        if len(shape) != 2 or not shape[1] or shape != [count, self.length or shape[1]]:
            raise ValueError(
                f"PairLoader: tokenizer must return {wanted} for {count} captions, got {shape}"
            )
        self.length = shape[1]
        array = tokens.numpy(force=True)
        if array.size and not -(2**31) <= int(array.min()) <= int(array.max()) < 2**31:
            raise ValueError("PairLoader: tokenizer must return tokens below 2^31")
        return array.astype(np.int32)


def _padding(tokens: np.ndarray) -> np.ndarray:
    """[n] how many tokens at the end of each row repeat the one before them."""
    same = tokens[:, :-1] == tokens[:, 1:]  # [n, L - 1]
    return np.logical_and.accumulate(same[:, ::-1], axis=1).sum(1)


def adapted(tokenizer: Any) -> Tokenizer:
    """A call in open_clip's form."""
    if not callable(tokenizer):
        raise TypeError(f"PairLoader: tokenizer must be callable, got {type(tokenizer).__name__}")
    if not hasattr(tokenizer, "model_max_length"):
        return tokenizer
    length = tokenizer.model_max_length
    if length > _NO_LIMIT:
        raise ValueError(
            "PairLoader: tokenizer.model_max_length must be the model's context length, got none"
        )
    return _Padded(tokenizer)


class _Padded:
    """A Hugging Face tokenizer in open_clip's form; words are read from it as `tokenizer`."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, texts: list[str]) -> Tensor:
        """[n, L] int64."""
        return self.tokenizer(
            texts, padding="max_length", truncation=True, return_tensors="pt",
            max_length=self.tokenizer.model_max_length,
        )["input_ids"]  # fmt: skip


def _encoded_length(tokenizer: Any) -> Callable[[str], int] | None:
    """Tokens a text needs with its start and end marks, uncut; None when it cannot be asked."""
    if hasattr(tokenizer, "sot_token_id") and hasattr(tokenizer, "encode"):  # open_clip's own
        return lambda text: len(tokenizer.encode(text)) + 2
    hugging_face = getattr(tokenizer, "tokenizer", tokenizer)  # open_clip wraps it
    if hasattr(hugging_face, "model_max_length") and hasattr(hugging_face, "encode"):
        return lambda text: len(hugging_face.encode(text, verbose=False))
    return None


def _chunks(count: int, progress: bool | None) -> Any:
    chunks = range(0, count, _CHUNK)
    show = (sys.stderr.isatty() and count > _CHUNK) if progress is None else progress
    if not show:  # a hidden bar, too, takes a lock that forked processes share: one may be killed
        return chunks
    from tqdm import tqdm

    return tqdm(chunks, desc="tokenising", unit=f"x{_CHUNK}")
