"""Millions of strings in two arrays, in use like a list of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

_CHUNK = 4096  # strings decoded from one copy of the bytes


class Strings(Sequence[str]):
    """An immutable sequence of strings: their UTF-8 bytes end to end, and where each ends.

    Equal to any list of the same strings. ``take`` and ``replaced`` are views: neither copies the
    bytes, which may lie in a file mapped into memory. Lone surrogates (undecodable bytes of file
    names) are kept.

    Args:
        blob: [bytes] uint8.
        ends: [M + 1] integers, string i is ``blob[ends[i]:ends[i + 1]]``.
        identity: names the content when it comes from a file.
        home: that file; what is derived from the strings is kept beside it.
    """

    def __init__(
        self,
        blob: np.ndarray,
        ends: np.ndarray,
        identity: str | None = None,
        home: Path | None = None,
    ) -> None:
        self._blob, self._ends, self.home = np.asarray(blob), np.asarray(ends), home
        self._rows: np.ndarray | None = None  # [n] place of each string in ends; None = all
        self._changed: dict[int, str] = {}  # position in this sequence -> its other string
        self._identity = identity

    @classmethod
    def of(cls, texts: Iterable[str]) -> Strings:
        """The same strings, packed; a `Strings` is returned as it is."""
        if isinstance(texts, Strings):
            return texts
        blob, ends = packed(texts)
        return cls(blob, ends)

    @property
    def identity(self) -> str | None:
        """A hash that only the same strings in the same order share; None for strings in memory."""
        if self._identity is None or (self._rows is None and not self._changed):
            return self._identity
        digest = hashlib.sha256(self._identity.encode())
        if self._rows is not None:
            digest.update(b"rows" + np.ascontiguousarray(self._rows, np.int64).tobytes())
        digest.update(repr(sorted(self._changed.items())).encode())
        return digest.hexdigest()

    def take(self, rows: np.ndarray) -> Strings:
        """The strings at [n] int64 rows in [0, len), as a view."""
        view = self._view(rows if self._rows is None else self._rows[rows])
        if self._changed:
            hits = np.flatnonzero(np.isin(rows, list(self._changed)))
            view._changed = {int(i): self._changed[int(rows[i])] for i in hits}
        return view

    def replaced(self, changes: Mapping[int, str]) -> Strings:
        """The same strings but for some, {position: string}."""
        view = self._view(self._rows)
        view._changed = self._changed | {int(i): text for i, text in changes.items()}
        return view

    def _view(self, rows: np.ndarray | None) -> Strings:
        view = Strings(self._blob, self._ends, self._identity, self.home)
        view._rows = rows
        return view

    def __len__(self) -> int:
        return len(self._ends) - 1 if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Strings: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        index = range(len(self))[index]
        if index in self._changed:
            return self._changed[index]
        row = index if self._rows is None else self._rows[index]
        return _text(self._blob[self._ends[row] : self._ends[row + 1]].tobytes())

    def __iter__(self) -> Iterator[str]:
        for blob, ends in self._chunks():
            content, places = blob.tobytes(), ends.tolist()
            for a, b in zip(places, places[1:], strict=False):
                yield _text(content[a:b])

    def _chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(bytes [b] uint8, ends [n + 1] int64) of the strings, some at a time."""
        for start in range(0, len(self), _CHUNK):
            stop = min(start + _CHUNK, len(self))
            if self._changed and not self._changed.keys().isdisjoint(range(start, stop)):
                yield packed(self[i] for i in range(start, stop))
                continue
            if self._rows is None:
                ends = self._ends[start : stop + 1]
                yield self._blob[ends[0] : ends[-1]], ends - ends[0]
                continue
            rows = self._rows[start:stop]
            first = self._ends[rows]
            lengths = self._ends[rows + 1] - first
            ends = np.concatenate([[0], np.cumsum(lengths)])
            yield self._blob[np.repeat(first - ends[:-1], lengths) + np.arange(ends[-1])], ends

    def sha256(self, skip: int = 0) -> str:
        """Of the strings in order, each without its first ``skip`` bytes; a view has a copy's."""
        digest = hashlib.sha256()
        for blob, ends in self._chunks():
            digest.update((np.diff(ends) - skip).astype("<i8").tobytes())
            if skip:
                kept = np.ones(len(blob), bool)
                kept[ends[:-1, None] + np.arange(skip)] = False
                blob = blob[kept]
            digest.update(blob.tobytes())
        return digest.hexdigest()

    def common_prefix(self) -> bytes:
        """What all strings begin with, in UTF-8; b"" of none."""
        found: np.ndarray | None = None
        for blob, ends in self._chunks():
            found = blob[: ends[1]] if found is None else found
            found = found[: np.diff(ends).min()]
            same = (blob[ends[:-1, None] + np.arange(len(found))] == found).all(0)  # [bytes]
            found = found[: int(np.argmin(np.append(same, False)))]
        return b"" if found is None else found.tobytes()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(repr(self[i]) for i in range(min(3, len(self))))
        return f"Strings([{shown}{', ...' if len(self) > 3 else ''}], {len(self)} in all)"


def packed(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """(bytes [b] uint8, ends [n + 1] int64) of strings."""
    blob, ends = bytearray(), [0]
    for text in texts:
        blob += text.encode("utf-8", "surrogatepass")
        ends.append(len(blob))
    return np.frombuffer(blob, np.uint8), np.array(ends, np.int64)


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogatepass")
