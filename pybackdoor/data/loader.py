"""Batches of pairs, in an order that (seed, epoch, position) says all about."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distributed import Ranks
from ._keyed import permutation
from .pairs import Pairs
from .store import gather
from .tokens import DifferentCaptions, TokenTable, token_table

_STATE = ("seed", "epoch", "position")


class PairLoader:
    """Iterates over one epoch of pairs at a time.

    Epoch e visits the pairs in a permutation that depends on (seed, e, len(pairs)) alone. Each
    global batch is split among the ranks as ``numpy.array_split`` does, so the ranks' batches put
    together are the batch of a single process. A batch at the end that would leave a rank without
    a pair, or hold a single pair in all, is left out: a contrast needs two.

    A pair whose image turns out to be broken is replaced by the next good one of the epoch's order
    from the same place of the next global batch on, around its end: on every rank, and after a
    resumption, by the same pair. The pairs' ledger counts it.

    An iteration starts at the loaded position, else at the start of the epoch. Run to its end, it
    moves on to the next epoch; left early, the next one starts where it started. Batches are
    prepared by a thread, which ends with the iteration.

    Args:
        pairs: at least two.
        tokenizer: list of n strings -> [n, L] tokens, or a Hugging Face tokenizer. Called once
            per different caption, at the first iteration; captions that it cuts are counted in
            one warning.
        batch_size: pairs of a global batch, over all ranks; at least 2 and one per rank.
        seed: of the order.
        shuffle: False = the order of the pairs.
        drop_last: leave out an incomplete batch at the end.
        rank, world_size: None = of torch.distributed where it runs, else 0 and 1.
        prefetch: batches prepared ahead.
        pin_memory: put batches in page-locked memory; None = when CUDA is in use.
        progress: show a bar while tokenising; None = on a terminal.
    Yields:
        {"images": [b, H, W, 3] uint8, on a GPU where the pairs are kept there, "tokens": [b, L]
        int64, "ids": [b] int64, "captions": [b] int64, the numbers of the captions in
        ``captions``}.
    Raises:
        TypeError, ValueError: naming the argument.
    Example:
        >>> for batch in PairLoader(pairs, tokenizer, batch_size=64): ...
    """

    def __init__(
        self,
        pairs: Pairs,
        tokenizer: Any,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
        prefetch: int = 2,
        pin_memory: bool | None = None,
        progress: bool | None = None,
    ) -> None:
        self.rank, self.world_size = _ranks(rank, world_size)
        if len(pairs) < 2:
            raise ValueError(f"PairLoader: pairs must hold at least 2 pairs, got {len(pairs)}")
        least = max(2, self.world_size)
        if _whole("batch_size", batch_size) < least:
            raise ValueError(
                f"PairLoader: batch_size must be at least 2 and at least one pair for each of "
                f"{self.world_size} ranks, got {batch_size}"
            )
        if _whole("prefetch", prefetch) < 1:
            raise ValueError(f"PairLoader: prefetch must be at least 1, got {prefetch}")
        self.pairs, self.tokenizer = pairs, tokenizer
        self.batch_size, self.shuffle, self.drop_last = batch_size, shuffle, drop_last
        self._least = batch_size if drop_last else least  # pairs that the last batch must hold
        if len(pairs) < self._least:
            raise ValueError(
                f"PairLoader: {len(pairs)} pairs do not fill one batch of {self._least}: lower "
                "batch_size (--batch-size)" + (", or pass drop_last=False" if drop_last else "")
            )
        self._prefetch, self._pin, self._progress = prefetch, pin_memory, progress
        self._seed = _whole("seed", seed)
        self._epoch = self._start = self._position = 0
        self._tokens: TokenTable | None = None

    def __len__(self) -> int:
        """Global batches of a whole epoch."""
        return len(self._batch_starts(0))

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration visits."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Visit this epoch next, from its start; a loaded position in the same epoch stays."""
        if _whole("epoch", epoch) != self._epoch:
            self._epoch, self._start, self._position = epoch, 0, 0

    def rewind(self) -> None:
        """Visit the epoch from its start, whatever position was loaded or reached."""
        self._start = self._position = 0

    @property
    def identity(self) -> dict[str, Any]:
        """Which pairs these are, and what their order depends on besides the epoch; JSON-ready."""
        return {
            "pairs": len(self.pairs), "batch_size": self.batch_size, "seed": self._seed,
            "shuffle": self.shuffle, "drop_last": self.drop_last, **self.pairs.identity,
        }  # fmt: skip

    def state_dict(self) -> dict[str, int]:
        """{"seed", "epoch", "position"}; position counts the pairs of the epoch delivered."""
        return {"seed": self._seed, "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from a state: the next iteration yields what remained.

        Batch size and number of ranks may differ from those that the state was taken with.

        Raises:
            ValueError: other keys, or a position outside the pairs.
        """
        if set(state) != set(_STATE):
            raise ValueError(f"PairLoader: state must hold {list(_STATE)}, got {sorted(state)}")
        seed, epoch, position = (_whole(name, state[name]) for name in _STATE)
        if position > len(self.pairs):
            raise ValueError(
                f"PairLoader: position must be in [0, {len(self.pairs)}], the pairs, got {position}"
            )
        self._seed, self._epoch, self._start, self._position = seed, epoch, position, position

    @property
    def image_ids(self) -> np.ndarray:
        """[N] int64, the ids of the pairs: whenever one comes, it comes with the same image."""
        return self.pairs.ids

    @property
    def captions(self) -> DifferentCaptions:
        """The different captions, tokenised."""
        return self._table().different

    def rewritten(self, rewrite: Callable[[str], str]) -> DifferentCaptions:
        """Tokens of what ``rewrite`` makes of each of ``captions``, by the number of that.

        Each is rewritten once, whatever the order, the epoch or the rank.
        """
        return self._table().rewritten(self.pairs.captions, rewrite, self.tokenizer)

    def _table(self) -> TokenTable:
        if self._tokens is None:
            self._tokens = token_table(self.pairs.captions, self.tokenizer, self._progress)
            self._tokens.warn_if_truncated()
        return self._tokens

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self._position = self._start
        return self._iterate(self._table())

    def _iterate(self, tokens: TokenTable) -> Iterator[dict[str, Tensor]]:
        seed, epoch = self._seed, self._epoch
        count = len(self.pairs)
        order = permutation(seed, epoch, count) if self.shuffle else np.arange(count)
        plan = _Plan(order, self._batch_starts(self._start), self.batch_size, self.rank,
                     self.world_size)  # fmt: skip
        pin = torch.cuda.is_initialized() if self._pin is None else self._pin
        with closing(_prefetched(plan, self.pairs, tokens, pin, self._prefetch)) as batches:
            for start, batch in zip(plan.starts, batches, strict=True):
                self._position = min(start + self.batch_size, count)
                yield batch
        if (self._seed, self._epoch) == (seed, epoch):
            self._epoch, self._start, self._position = epoch + 1, 0, 0

    def _batch_starts(self, first: int) -> range:
        """Where in the epoch's order each global batch starts, from a first position on."""
        starts = range(first, len(self.pairs), self.batch_size)
        if len(starts) and len(self.pairs) - starts[-1] < self._least:
            starts = starts[:-1]
        return starts


@dataclass(frozen=True)
class _Plan:
    """Which pairs of an epoch a rank's batches hold."""

    order: np.ndarray  # [N] int64 rows
    starts: range  # of the global batches, in order
    batch_size: int
    rank: int
    world_size: int

    def places(self, start: int) -> np.ndarray:
        """[b] places in the order of this rank's share of the batch that starts at one."""
        stop = min(start + self.batch_size, len(self.order))
        return np.array_split(np.arange(start, stop), self.world_size)[self.rank]

    def substitutes(self, place: int) -> Iterator[int]:
        """Rows to try in place of a broken one."""
        count = len(self.order)
        for step in range(count):
            yield int(self.order[(place + self.batch_size + step) % count])


def _prefetched(
    plan: _Plan, pairs: Pairs, tokens: TokenTable, pin: bool, depth: int
) -> Generator[dict[str, Tensor], None, None]:
    """The plan's batches, made by a thread that is at most depth batches ahead.

    Batches that lie on a GPU are gathered on the thread's own stream, not behind the training.
    What the thread raises is raised here. However the caller leaves, the thread is over after.
    """
    ready: queue.Queue[Any] = queue.Queue(depth)
    stop = threading.Event()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def work() -> None:
        try:
            aside: AbstractContextManager[Any] = nullcontext()
            if device is not None:
                torch.cuda.set_device(device)  # else pinning would open a context on device 0
                aside = torch.cuda.stream(torch.cuda.Stream(device))
            with aside:
                for start in plan.starts:
                    if stop.is_set():
                        return
                    batch = _batch(pairs, tokens, plan, start, pin)
                    if batch["images"].is_cuda:
                        torch.cuda.current_stream(batch["images"].device).synchronize()
                    ready.put(batch)
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=work, name="pybackdoor-prefetch", daemon=True)
    try:
        thread.start()
        for _ in plan.starts:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            images = item["images"]
            if images.is_cuda:  # the thread may not have their memory again before this stream
                images.record_stream(torch.cuda.current_stream(images.device))
            yield item
    finally:
        stop.set()
        while thread.is_alive():  # it may be waiting for room in the queue
            try:
                ready.get(timeout=0.01)
            except queue.Empty:
                pass


def _batch(
    pairs: Pairs, tokens: TokenTable, plan: _Plan, start: int, pin: bool
) -> dict[str, Tensor]:
    places = plan.places(start)
    rows = plan.order[places]
    images, broken = gather(pairs.images, rows)
    for at in broken:
        for row in plan.substitutes(int(places[at])):
            image, bad = gather(pairs.images, np.array([row]))
            if not bad:
                images[at], rows[at] = image[0], row
                break
        else:
            raise ValueError("PairLoader: none of the images can be decoded")
    batch = {
        "images": images,
        "tokens": tokens.take(rows),
        "captions": torch.from_numpy(tokens.numbers(rows)),
        "ids": torch.from_numpy(pairs.ids[rows]),
    }
    if not pin:
        return batch
    return {n: value if value.is_cuda else value.pin_memory() for n, value in batch.items()}


def _ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ValueError("PairLoader: rank and world_size go together: give both or neither")
    if rank is None or world_size is None:
        ranks = Ranks()
        return ranks.rank, ranks.size
    if not 0 <= _whole("rank", rank) < _whole("world_size", world_size):
        raise ValueError(f"PairLoader: rank must be in [0, world_size), got {rank} of {world_size}")
    return rank, world_size


def _whole(name: str, value: Any) -> int:
    """A non-negative integer argument."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"PairLoader: {name} must be an integer, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"PairLoader: {name} must not be negative, got {value}")
    return int(value)
