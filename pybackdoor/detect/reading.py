"""What the methods need of a model and its training pairs, read batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batches import Batch, read_batch
from ..data import Pairs
from ..data.ondemand import shown
from ..data.store import attempt
from ..features import FeatureReader
from ..ubt.suspects import Suspects

_CAPTIONS = 4096  # whose features are kept for when they come again


@dataclass(frozen=True)
class Reading:
    """Features or cosines of the n of N pairs whose images can be decoded.

    Attributes:
        ids: [N] int64.
        rows: [n] int64 in [0, N), ascending.
        broken: {row: reason} of the others.
        images: [n, D] fp32 unit rows on the CPU, of the first model; None when not asked for.
        cosines: [models, n] float64, of image and caption; None when not asked for.
    """

    ids: np.ndarray
    rows: np.ndarray
    broken: dict[int, str]
    images: Tensor | None
    cosines: np.ndarray | None


@dataclass(frozen=True)
class _Chunk:
    """Some pairs in order: all their ids, and the batch of those that are not broken."""

    ids: np.ndarray  # [c] int64
    batch: Batch
    captions: list[str] | None = None  # of the batch; None = the batch has tokens
    broken: dict[int, str] = field(default_factory=dict)  # place in the chunk -> reason


def read(
    readers: Sequence[FeatureReader],
    source: Pairs | Iterable[Any],
    *,
    images: bool,
    cosines: bool,
    progress: bool | None = False,
) -> Reading:
    """Encode every pair once with each model; pixels and tokens of one batch are held at a time.

    Args:
        readers: one per model; the first one's rules are the batches' rules.
        source: pairs, or an iterable of batches as for ``par_clean``.
        images: keep the image features, 4·D bytes a pair, twice that for a moment.
        cosines: keep the cosines of image and caption.
        progress: show a bar; None = on a terminal.
    Raises:
        TypeError, ValueError: batches of another kind or size, features that are not finite, no
            pair that can be used.
    """
    from tqdm import tqdm

    of_pairs = isinstance(source, Pairs)
    chunks = _of_pairs(source, readers, cosines) if of_pairs else _of_loader(source, readers[0])
    texts = [_Captions(reader) for reader in readers]
    ids: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    kept: list[Tensor] = []
    found: list[Tensor] = []
    broken: dict[int, str] = {}
    total = len(source) if of_pairs else None
    with ExitStack() as stack:
        for reader in readers:
            stack.enter_context(reader.reading())
        bar = stack.enter_context(
            tqdm(total=total, desc="encoding", unit="pair", disable=not shown(progress))
        )
        start = 0
        for chunk in chunks:
            good = np.setdiff1d(np.arange(len(chunk.ids)), list(chunk.broken))
            ids.append(chunk.ids)
            rows.append(start + good)
            broken |= {start + place: reason for place, reason in chunk.broken.items()}
            start += len(chunk.ids)
            bar.update(len(chunk.ids))
            if not len(good):
                continue
            features = [reader.batch(chunk.batch) for reader in readers[: None if cosines else 1]]
            if images:
                kept.append(features[0])
            if cosines:
                both = zip(features, texts, strict=True)
                found.append(torch.stack([_cosines(x, text(chunk)) for x, text in both]))
    if not start or len(broken) == start:
        raise ValueError(f"detect: wanted pairs that can be used, got none of {start}")
    return Reading(
        np.concatenate(ids), np.concatenate(rows), broken, torch.cat(kept) if images else None,
        torch.cat(found, 1).numpy() if cosines else None,
    )  # fmt: skip


def _of_pairs(pairs: Pairs, readers: Sequence[FeatureReader], texts: bool) -> Iterator[_Chunk]:
    for reader in readers:
        reader.check_pixels(pairs.images.image_size)
    for start in range(0, len(pairs), readers[0].batch_size):
        rows = np.arange(start, min(start + readers[0].batch_size, len(pairs)))
        pixels, broken = attempt(pairs.images, rows)
        good = np.setdiff1d(np.arange(len(rows)), list(broken))
        no_tokens = torch.empty(len(good), 0, dtype=torch.int64, device="cpu")
        batch = Batch(torch.from_numpy(pixels[good]), no_tokens, None)
        captions = [pairs.captions[int(row)] for row in rows[good]] if texts else []
        yield _Chunk(pairs.ids[rows], batch, captions, broken)


def _of_loader(loader: Iterable[Any], reader: FeatureReader) -> Iterator[_Chunk]:
    start = 0
    for raw in loader:
        batch = read_batch(raw, reader.rules, first=not start)
        numbers = np.arange(start, start + len(batch))
        yield _Chunk(numbers if batch.ids is None else batch.ids.numpy(force=True), batch)
        start += len(batch)


def read_suspects(source: Pairs | Iterable[Any], suspects: Suspects) -> Reading:
    """What ``read`` gives, without features: of pairs that are read more than once.

    Args:
        suspects: the source's pairs that can be used.
    """
    ids, broken = suspects.ids, {}
    if isinstance(source, Pairs):
        ids, lost = source.ids, np.setdiff1d(np.arange(len(source)), suspects.rows)
        broken = {int(row): attempt(source.images, [row])[1][0] for row in lost}
    return Reading(ids, suspects.rows, broken, None, None)


class _Captions:
    """Text features of chunks; of captions that come again soon, encoded once."""

    def __init__(self, reader: FeatureReader) -> None:
        self._reader = reader
        self._known: dict[str, Tensor] = {}

    def __call__(self, chunk: _Chunk) -> Tensor:  # [n, D]
        if chunk.captions is None:
            return self._reader.tokens(chunk.batch.tokens)
        if len(self._known) + len(chunk.captions) > _CAPTIONS:
            self._known.clear()
        new = [text for text in dict.fromkeys(chunk.captions) if text not in self._known]
        if new:
            self._known.update(zip(new, self._reader.captions(new), strict=True))
        return torch.stack([self._known[text] for text in chunk.captions])


def _cosines(images: Tensor, texts: Tensor) -> Tensor:  # [n, D] unit rows each
    return (images.double() * texts.double()).sum(1)
