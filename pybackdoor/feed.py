"""The batches of a run: read, counted over the ranks, and agreed on before any is used.

The ranks exchange one line of numbers per batch: how many pairs each holds, whether one of them
failed to read its batch, and whether one wants to stop. So a rank that fails takes the others along
instead of leaving them waiting.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from .batches import Batch, InputRules, read_batch
from .distributed import Ranks

_FAILED = -1.0  # what a rank gives for the size of a batch that it cannot read


@dataclass(frozen=True)
class Item:
    """One usable batch: this rank's share, and what the ranks agreed on."""

    epoch: int
    batch: Batch
    counts: list[int]  # pairs of each rank
    ids: Tensor  # [n] int64, the loader's own or running numbers


class Feed:
    """Usable batches for a number of steps, or of passes over the loader.

    Args:
        loader: this rank's own; walked anew for each epoch, after ``set_epoch`` where it or its
            sampler has one.
        steps: batches wanted; None for ``epochs`` passes.
    Attributes:
        steps: batches planned, the same on every rank.
        skipped: batches left out since they held a single pair in all, or none on some rank.
    Raises:
        ValueError: the loader cannot give what is wanted; where possible before the first batch.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        rules: InputRules,
        ranks: Ranks,
        device: torch.device,
        *,
        steps: int | None,
        epochs: int,
    ) -> None:
        self._loader, self._rules, self._ranks, self._device = loader, rules, ranks, device
        self._epochs = None if steps is not None else epochs
        self._stopping = False
        self.skipped = 0
        self.steps = self._planned(steps, epochs)

    def stop(self) -> None:
        """End after the batch in hand; on several ranks, all of them end."""
        self._stopping = True

    def __iter__(self) -> Iterator[Item]:
        given = seen = epoch = 0
        while epoch != self._epochs:
            for holder in (self._loader, getattr(self._loader, "sampler", None)):
                if hasattr(holder, "set_epoch"):
                    holder.set_epoch(epoch)
            used = 0
            for batch in self._read(first=seen == 0):
                counts = self._agreed(batch)
                if counts is None:
                    return
                total = sum(counts)
                if total < 2 or min(counts) < 1:
                    if seen == 0:
                        got = counts if self._ranks.size > 1 else total
                        raise ValueError(
                            "a batch must hold at least two pairs, and one on every rank, got "
                            f"{got}: the loss needs negatives"
                        )
                    self.skipped += 1
                    continue
                if seen == 0:
                    self._refuse_equal_shares(batch)
                start = seen + sum(counts[: self._ranks.rank])
                ids = batch.ids
                if ids is None:
                    ids = torch.arange(start, start + len(batch))
                seen, used, given = seen + total, used + 1, given + 1
                yield Item(epoch, batch, counts, ids)
                if given == self.steps or (self._stopping and self._ranks.size == 1):
                    return
            if used == 0:
                what = "is empty" if epoch == 0 else f"yields nothing in epoch {epoch + 1}"
                self._fail(
                    ValueError(
                        f"loader {what}: wanted batches of at least two pairs, got {seen} pairs so "
                        "far (a one-shot iterator cannot be walked again: pass a DataLoader or a "
                        "list)"
                    )
                )
            epoch += 1

    def _planned(self, steps: int | None, epochs: int) -> int:
        try:
            length = len(self._loader)  # type: ignore[arg-type]
        except TypeError:
            length = None
        if steps is None:
            if length is None:
                raise ValueError(
                    "steps must be given: the loader has no len(), so epochs cannot be counted"
                )
            steps = epochs * length
        if steps < 1 or length == 0:
            raise ValueError("loader is empty: wanted at least one batch of two pairs, got none")
        if length is not None and steps > length and iter(self._loader) is self._loader:
            raise ValueError(
                f"loader is a one-shot iterator of {length} batches, {steps} are wanted: pass the "
                "DataLoader or list itself"
            )
        every = [int(row[0]) for row in self._ranks.agree([steps], self._device)]
        if len(set(every)) > 1:
            raise ValueError(f"every rank must take the same number of steps, got {every}")
        return steps

    def _read(self, first: bool) -> Iterator[Batch]:
        """The loader's batches; an error reaches the other ranks before it is raised."""
        items = iter(self._loader)
        while True:
            try:
                raw = next(items)
                batch = read_batch(raw, self._rules, first=first)
            except StopIteration:
                return
            except Exception as error:
                self._fail(error)
            first = False
            yield batch

    def _agreed(self, batch: Batch) -> list[int] | None:
        """Pairs on each rank, or None when one of them wants to stop."""
        rows = self._ranks.agree([len(batch), self._stopping], self._device)
        for rank, (count, _) in enumerate(rows):
            if count == _FAILED:
                raise RuntimeError(f"rank {rank} could not read its batch; its own error says why")
        return None if any(stop for _, stop in rows) else [int(count) for count, _ in rows]

    def _fail(self, error: Exception) -> NoReturn:
        self._ranks.agree([_FAILED, 0.0], self._device)
        raise error

    def _refuse_equal_shares(self, batch: Batch) -> None:
        """Ranks that hold the same pairs would take each other's for negatives."""
        if self._ranks.size == 1:
            return
        sums = [float(t.double().sum()) for t in (batch.images, batch.tokens)]
        shares = self._ranks.agree(sums, self._device)
        if all(share == shares[0] for share in shares):
            raise ValueError(
                f"all {self._ranks.size} ranks hold the same first batch: each must yield its own "
                "share (PairLoader does; a DataLoader needs a DistributedSampler)"
            )
