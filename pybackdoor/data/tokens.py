"""Captions as tokens: each different caption tokenised once, kept without its padding."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Tokenizer = Callable[[list[str]], Tensor]

_CHUNK = 4096  # captions a call; bounds the padded block to 1.3 MB at 77 tokens
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
        self._of_row = np.fromiter(
            (number.setdefault(caption, len(number)) for caption in captions),
            np.int64,
            len(captions),
        )
        unique = list(number)
        encoded_length = _encoded_length(tokenizer)
        call = adapted(tokenizer)
        flat: list[np.ndarray] = []
        ends: list[np.ndarray] = [np.zeros(1, np.int64)]
        truncated = np.zeros(len(unique), bool)
        self.length = 0
        for start in _chunks(len(unique), progress):
            texts = unique[start : start + _CHUNK]
            tokens = self._checked(call(texts), len(texts))
            kept = tokens.shape[1] - _padding(tokens)  # [n] tokens to keep
            flat.append(tokens[np.arange(tokens.shape[1]) < kept[:, None]])
            ends.append(ends[-1][-1] + np.cumsum(kept))
            if encoded_length is not None:
                # A row that ends in padding was not cut; only the others are encoded again.
                for i in np.flatnonzero(kept == tokens.shape[1]):
                    truncated[start + i] = encoded_length(texts[i]) > tokens.shape[1]
        self._flat = np.concatenate(flat) if flat else np.empty(0, np.int32)
        self._ends = np.concatenate(ends)
        self.num_truncated = None
        if encoded_length is not None:
            self.num_truncated = int(np.count_nonzero(truncated[self._of_row]))

    def __len__(self) -> int:
        return len(self._of_row)

    def take(self, indices: np.ndarray) -> Tensor:
        """[n, L] int64 tokens of the captions at [n] indices."""
        out = np.empty((len(indices), self.length), np.int64)
        for row, which in zip(out, self._of_row[indices], strict=True):
            start, end = self._ends[which], self._ends[which + 1]
            row[: end - start] = self._flat[start:end]
            row[end - start :] = self._flat[end - 1]
        return torch.from_numpy(out)

    def warn_if_truncated(self) -> None:
        """Say how many captions lose their end, when any do."""
        if self.num_truncated:
            warnings.warn(
                f"PairLoader: {self.num_truncated} of {len(self)} captions are longer than the "
                f"context length of {self.length} tokens and lose their end",
                UserWarning,
                stacklevel=3,
            )

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
    return lambda texts: tokenizer(
        texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )["input_ids"]


def _encoded_length(tokenizer: Any) -> Callable[[str], int] | None:
    """Tokens a text needs with its start and end marks, uncut; None when it cannot be asked."""
    if hasattr(tokenizer, "sot_token_id") and hasattr(tokenizer, "encode"):  # open_clip's own
        return lambda text: len(tokenizer.encode(text)) + 2
    hugging_face = getattr(tokenizer, "tokenizer", tokenizer)  # open_clip wraps it
    if hasattr(hugging_face, "model_max_length") and hasattr(hugging_face, "encode"):
        return lambda text: len(hugging_face.encode(text, verbose=False))
    return None


def _chunks(count: int, progress: bool | None) -> Any:
    from tqdm import tqdm

    show = (sys.stderr.isatty() and count > _CHUNK) if progress is None else progress
    chunks = range(0, count, _CHUNK)
    return tqdm(chunks, desc="tokenising", unit=f"x{_CHUNK}", disable=not show)
