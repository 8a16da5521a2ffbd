"""The pairs under suspicion: read by row, and as batches of some of their rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batches import InputRules, Tokenizer, read_batch
from ..data import ArrayImages, ImageStore, PairLoader, Pairs
from ..data._keyed import permutation
from ..data.index import hashed
from ..data.store import decode_all, subset_images
from ..data.tokens import adapted, token_table
from ..distributed import Ranks
from ..engine.texts import NumberedCaptions

_PRIORITY_STREAM = 0x70726972


@dataclass(frozen=True, eq=False)
class Suspects:
    """Training pairs under suspicion.

    Attributes:
        images: N images, uint8.
        different: the U different captions as tokens.
        caption: [N] int64 in [0, U), each pair's own.
        ids: [N] int64, keys of what is random.
        texts, locations: N strings; None for batches of tokens.
        tokenizer: that made the tokens; None where only the loader knows.
        rows: [N] int64 in the source, which may hold broken images besides.
        total: pairs of the source.
    """

    images: ImageStore
    different: NumberedCaptions
    caption: np.ndarray
    ids: np.ndarray
    texts: Any
    locations: Any
    tokenizer: Tokenizer | None
    rows: np.ndarray
    total: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def identity(self) -> str:
        """A hash that tells these pairs from others; pixels are not looked at."""
        if self.texts is not None:
            named = Pairs(self.images, self.texts, self.ids, self.locations)
            return hashed(named.identity)[:16]
        tokens = self.tokens(np.arange(len(self))).numpy()
        return hashlib.sha256(self.ids.tobytes() + tokens.tobytes()).hexdigest()[:16]

    def check_alike(self, ranks: Ranks, device: torch.device) -> None:
        """Refuse ranks that hold unlike pairs: a row must mean the same one everywhere."""
        told = ranks.agree([len(self), int(self.identity[:12], 16)], device)
        if any(mine != told[0] for mine in told):
            raise ValueError(
                "suspect_loader must yield the same pairs in the same order on every rank, got "
                "others on some: every rank reads all of it, without a DistributedSampler"
            )

    def tokens(self, rows: np.ndarray) -> Tensor:
        """[n, L] int64 tokens of the captions at [n] rows."""
        return self.different.tokens(self.caption[rows])

    def pixels(self, rows: np.ndarray) -> Tensor:
        """[n, H, W, 3] uint8 images at [n] rows."""
        return torch.from_numpy(self.images.take(rows))

    def text(self, row: int) -> str | None:
        return None if self.texts is None else self.texts[int(row)]

    @staticmethod
    def of(
        source: Any, rules: InputRules, progress: bool | None = False, what: str = "suspect_loader"
    ) -> Suspects:
        """The pairs of a PairLoader, of Pairs, or of an iterable of batches, which is kept whole.

        Broken images are left out.

        Args:
            rules: of the model; its tokenizer is needed for Pairs and for batches of strings.
            what: names the argument in errors.
        Raises:
            TypeError, ValueError: fewer than two pairs, images that are not uint8, captions of
                which all are equal.
        """
        tokenizer = rules.tokenizer
        if isinstance(source, PairLoader):
            source, tokenizer = source.pairs, source.tokenizer
        if isinstance(source, Pairs):
            if tokenizer is None:
                raise ValueError(f"{what} is made of captions: tokenizer= is needed to read them")
            found = _of_pairs(source, adapted(tokenizer), progress)
        else:
            found = _of_batches(source, rules, what)
        if len(found) < 2:
            raise ValueError(f"{what} must hold at least 2 usable pairs, got {len(found)}")
        if (found.caption == found.caption[0]).all():
            raise ValueError(
                f"{what}: the captions of all {len(found)} pairs are equal, so that none is "
                "mismatched and nothing can be contrasted; wanted different captions"
            )
        return found


def _of_pairs(pairs: Pairs, tokenizer: Any, progress: bool | None) -> Suspects:
    good = np.flatnonzero(decode_all(pairs.images, progress))
    used = pairs if len(good) == len(pairs) else pairs.subset(good)
    numbers, different = token_table(used.captions, tokenizer, progress).equal_as_one(used.captions)
    return Suspects(
        used.images, different, numbers, used.ids, used.captions, used.locations,
        tokenizer, good, len(pairs),
    )  # fmt: skip


def _of_batches(loader: Iterable[Any], rules: InputRules, what: str) -> Suspects:
    images, tokens, ids, seen = [], [], [], 0
    for raw in loader:
        batch = read_batch(raw, rules, first=not seen)
        if batch.images.dtype != torch.uint8:
            raise TypeError(
                f"{what} must yield uint8 images, which can be kept and shown, got "
                f"{batch.images.dtype}: resize and crop, but leave ToTensor and Normalize out"
            )
        pixels = batch.images.cpu()
        images.append(pixels if pixels.shape[-1] == 3 else pixels.permute(0, 2, 3, 1))
        tokens.append(batch.tokens.cpu())
        for name, kept in (("images", images), ("tokens", tokens)):
            first, now = (tuple(part.shape[1:]) for part in (kept[0], kept[-1]))
            if first != now:
                raise ValueError(f"{what} must yield {name} of one size, got {first} and {now}")
        own = batch.ids
        if own is None:
            own = torch.arange(seen, seen + len(batch), device="cpu")
        ids.append(own.cpu())
        seen += len(batch)
    if not seen:
        raise ValueError(f"{what} is empty: wanted pairs, got none")
    unique, number = torch.cat(tokens).unique(dim=0, return_inverse=True)
    return Suspects(
        ArrayImages(torch.cat(images).contiguous()), HeldCaptions(unique), number.numpy(),
        torch.cat(ids).numpy(), None, None, rules.tokenizer, np.arange(seen), seen,
    )  # fmt: skip


class HeldCaptions:
    """Different captions whose tokens are held: [U, L]."""

    def __init__(self, tokens: Tensor) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def lengths(self) -> np.ndarray:
        """[U] tokens of each, one of the padding among them."""
        same = (self._tokens[:, 1:] == self._tokens[:, :-1]).flip(1).to(torch.uint8)
        return (self._tokens.shape[1] - same.cummin(1).values.sum(1)).numpy()

    def tokens(self, numbers: np.ndarray) -> Tensor:
        """[b, L] int64."""
        return self._tokens[torch.from_numpy(np.asarray(numbers))].to(torch.int64)


class RowLoader:
    """Batches of some rows of the suspect pairs, in an order of (seed, epoch).

    Each rank gets its share of every batch. An incomplete batch at the end is left out, unless it
    is the only one.

    Args:
        rows: [n] int64, at least two.
        priority: [n] shares by which rows are drawn, with replacement; None: each once per epoch.
    Yields:
        As PairLoader does.
    """

    def __init__(
        self,
        suspects: Suspects,
        rows: np.ndarray,
        *,
        batch_size: int,
        seed: int = 0,
        priority: np.ndarray | None = None,
    ) -> None:
        if batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 pairs, got {batch_size}")
        if len(rows) < 2:
            raise ValueError(f"rows must be at least 2, got {len(rows)}")
        self._suspects, self._rows, self._seed = suspects, np.asarray(rows), seed
        self.batch_size = min(batch_size, len(rows))
        self._priority, self._epoch = priority, 0

    def __len__(self) -> int:
        return len(self._rows) // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    @property
    def captions(self) -> NumberedCaptions:
        return self._suspects.different

    @property
    def identity(self) -> dict[str, Any]:
        """What the order depends on, besides the epoch; JSON-ready."""
        rows = hashlib.sha256(self._rows.tobytes()).hexdigest()[:16]
        return {
            "pairs": len(self._rows), "rows": rows, "batch_size": self.batch_size,
            "seed": self._seed,
        }  # fmt: skip

    def _order(self) -> np.ndarray:
        n = len(self._rows)
        if self._priority is None:
            return permutation(self._seed, self._epoch, n)
        rng = np.random.default_rng([self._seed, self._epoch, _PRIORITY_STREAM])
        return rng.choice(n, n, p=self._priority)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order, ranks = self._rows[self._order()], Ranks()
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            rows = order[start : start + self.batch_size]
            rows = np.array_split(rows, ranks.size)[ranks.rank]
            yield {
                "images": self._suspects.pixels(rows),
                "tokens": self._suspects.tokens(rows),
                "captions": torch.from_numpy(self._suspects.caption[rows]),
                "ids": torch.from_numpy(self._suspects.ids[rows]),
            }


def subset(suspects: Suspects, rows: np.ndarray) -> Suspects:
    """The pairs at [n] rows, as a view."""
    return Suspects(
        subset_images(suspects.images, rows), suspects.different, suspects.caption[rows],
        suspects.ids[rows],
        None if suspects.texts is None else suspects.texts.take(rows),
        None if suspects.locations is None else suspects.locations.take(rows),
        suspects.tokenizer, suspects.rows[rows], suspects.total,
    )  # fmt: skip
