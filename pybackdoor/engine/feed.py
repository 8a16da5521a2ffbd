"""The batches of a run: read, counted over the ranks, and agreed on before any is used.

The ranks exchange one line of numbers per batch: how many pairs each holds, whether one of them
failed to read its batch, whether one wants to stop, and whether the first wants the state saved. So
a rank that fails takes the others along instead of leaving them waiting.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..batches import Batch, InputRules, read_batch
from ..distributed import Ranks

_AT_WILL = 1  # below the numbers of the signals that end a run
_FAILED = -1.0  # what a rank gives for the size of a batch that it cannot read


@dataclass(frozen=True)
class Item:
    """One usable batch: this rank's share, and what the ranks agreed on."""

    epoch: int
    batch: Batch
    counts: list[int]  # pairs of each rank
    ids: Tensor  # [n] int64, the loader's own or running numbers
    save: bool  # whether the state is wanted after this batch
    after: dict[str, Any]  # where the feed stands after it, see Feed.position


class Feed:
    """Usable batches for a number of steps, or of passes over the loader.

    Args:
        loader: this rank's own; walked anew for each epoch, after ``set_epoch`` where it or its
            sampler has one.
        steps: batches wanted; None for ``epochs`` passes.
        seed: of what a loader without a state of its own draws from torch's generator.
        patient: a context in which it waits for other ranks.
    Attributes:
        steps: batches planned, the same on every rank.
        position: where the next iteration starts: "epoch"; "batches", those read in it; "used", how
            many of these were usable; "given", usable ones in all; "seen", pairs in all; "skipped",
            batches left out since they held a single pair in all, or none on some rank, or gave
            no finite numbers; "loader", its own state, where it has state_dict and
            load_state_dict. Without these, a position within an epoch is reached by reading what
            lies before it.
        signal: what has ended the feed early, the same on every rank: 0, nothing; a signal's
            number; 1, ``stop`` without one.
        failed: whether it has ended in an error, of which every rank knows.
        waiting: seconds spent waiting for the loader.
        save: set to have the state saved after the next batch; the first rank's is what counts.
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
        seed: int = 0,
        patient: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._patient = patient
        self._loader, self._rules, self._ranks, self._device = loader, rules, ranks, device
        self._epochs = None if steps is not None else epochs
        self._stopping, self._checked = 0, False
        self._has_state = _has_state(loader)
        self._seed = seed
        self.signal, self.failed = 0, False
        self.waiting, self.save = 0.0, False
        self.position: dict[str, Any] = dict.fromkeys(
            ("epoch", "batches", "used", "given", "seen", "skipped"), 0
        )
        self.steps = self._planned(steps, epochs)

    def stop(self, signal: int = _AT_WILL) -> None:
        """End after the batch in hand; on several ranks, all of them end, and know the signal."""
        self._stopping = max(self._stopping, signal)

    def leave_out(self, item: Item, given: int) -> None:
        """Go on behind a batch that was no step after all, of which ``given`` have been taken."""
        self.position = {**item.after, "given": given}
        self.position["skipped"] += 1

    def __iter__(self) -> Iterator[Item]:
        at = self.position
        while at["epoch"] != self._epochs:
            if at["given"] >= self.steps:
                return
            for batch in self._read(at):
                counts, save = self._agreed(batch)
                if counts is None:
                    return
                total = sum(counts)
                after = at | {"batches": at["batches"] + 1}
                if self._has_state:
                    after["loader"] = dict(self._loader.state_dict())  # type: ignore[attr-defined]
                if total < 2 or min(counts) < 1:
                    if at["seen"] == 0:
                        got = counts if self._ranks.size > 1 else total
                        raise ValueError(
                            "a batch must hold at least two pairs, and one on every rank, got "
                            f"{got}: the loss needs negatives"
                        )
                    at = self.position = after | {"skipped": at["skipped"] + 1}
                    continue
                if not self._checked:
                    self._refuse_equal_shares(batch)
                    self._checked = True
                start = at["seen"] + sum(counts[: self._ranks.rank])
                ids = batch.ids
                if ids is None:
                    ids = torch.arange(start, start + len(batch), device="cpu")
                for name, more in (("used", 1), ("given", 1), ("seen", total)):
                    after[name] = at[name] + more
                at = self.position = after
                yield Item(at["epoch"], batch, counts, ids, save, after)
                if self._stopping and self._ranks.size == 1:
                    self.signal = self._stopping
                    return
                if at["given"] == self.steps:
                    return
            if at["used"] == 0:
                epoch = at["epoch"]
                what = "is empty" if epoch == 0 else f"yields nothing in epoch {epoch + 1}"
                self._fail(
                    ValueError(
                        f"loader {what}: wanted batches of at least two pairs, got {at['seen']} "
                        "pairs so far (a one-shot iterator cannot be walked again: pass a "
                        "DataLoader or a list)"
                    )
                )
            at = self.position = at | {"epoch": at["epoch"] + 1, "batches": 0, "used": 0}
            at.pop("loader", None)

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
        if length is not None and steps > length and hasattr(self._loader, "__next__"):
            raise ValueError(
                f"loader is a one-shot iterator of {length} batches, {steps} are wanted: pass the "
                "DataLoader or list itself"
            )
        every = [int(row[0]) for row in self._ranks.agree([steps], self._device)]
        if len(set(every)) > 1:
            raise ValueError(f"every rank must take the same number of steps, got {every}")
        return steps

    def _read(self, at: Mapping[str, Any]) -> Iterator[Batch]:
        """The batches of the epoch from a position on; an error reaches the other ranks first."""
        for holder in (self._loader, getattr(self._loader, "sampler", None)):
            if hasattr(holder, "set_epoch"):
                holder.set_epoch(at["epoch"])
        if hasattr(self._loader, "rewind"):
            self._loader.rewind()
        first, passed = at["seen"] == 0, 0
        if at["batches"]:
            passed = at["batches"]
            if "loader" in at:
                self._loader.load_state_dict(at["loader"])  # type: ignore[attr-defined]
                passed = 0
        # What a DataLoader draws its order from, the same when the epoch is read again.
        torch.default_generator.manual_seed(
            (self._seed * 0x9E3779B97F4A7C15 + at["epoch"] * self._ranks.size + self._ranks.rank)
            % 2**63
        )
        items = iter(self._loader)
        if items is self._loader:  # it goes on from where it is
            passed = 0
        while True:
            try:
                with self._patient():  # until the place is reached
                    while passed:
                        next(items)
                        passed -= 1
                began = time.perf_counter()
                raw = next(items)
                self.waiting += time.perf_counter() - began
                batch = read_batch(raw, self._rules, first=first)
            except StopIteration:
                return
            except Exception as error:
                self._fail(error)
            first = False
            yield batch

    def _agreed(self, batch: Batch) -> tuple[list[int] | None, bool]:
        """Pairs on each rank, or None when one of them wants to stop; whether to save."""
        mine = [len(batch), self._stopping, self.save]
        with self._patient():
            rows = self._ranks.agree(mine, self._device)
        for rank, (count, *_) in enumerate(rows):
            if count == _FAILED:
                self.failed = True
                raise RuntimeError(f"rank {rank} could not read its batch; its own error says why")
        self.save = False
        self.signal = int(max(row[1] for row in rows))
        return None if self.signal else [int(row[0]) for row in rows], bool(rows[0][2])

    def _fail(self, error: Exception) -> NoReturn:
        with self._patient():
            self._ranks.agree([_FAILED, 0.0, 0.0], self._device)
        self.failed = True
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


def _has_state(loader: Any) -> bool:
    """Whether the loader tells its place in a form that a checkpoint can hold."""
    if not all(hasattr(loader, name) for name in ("state_dict", "load_state_dict")):
        return False
    try:
        json.dumps(loader.state_dict())
    except (TypeError, ValueError):
        return False
    return True
