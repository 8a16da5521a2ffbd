"""Ends every process of a run when one of them is gone or hangs, instead of leaving it waiting.

Each rank's thread writes a beat into the process group's store, and whether the training loop gets
on: whether its last step is not older than the limit, or than many times the longest that reading a
batch or a step took. A thread
that hears of a rank that it does not, or hears nothing from it, says so and ends its process.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from ..distributed import Ranks, seconds_of
from .faults import NonFiniteError

LIMIT = 30.0  # seconds
_PATIENCE = 20  # times the longest step so far: what a step may take
_BEATS = 6  # in the time limit
_MISSED = 4  # beats: two are left for when the last one was written and when it is looked for
_LEFT, _STUCK = b"-1", b"-2"  # in place of a beat's number


class Watch:
    """Within the block the ranks watch each other; does nothing for a single process.

    Args:
        limit: seconds within which the others of a lost rank have ended, where it hangs after the
            step it hangs in has taken as long; PYBACKDOOR_RANK_TIMEOUT sets another one.
    """

    _runs = 0

    def __init__(self, ranks: Ranks, limit: float | None = None) -> None:
        self._ranks = ranks
        self._limit = limit or seconds_of("PYBACKDOOR_RANK_TIMEOUT", LIMIT)
        self._since, self._longest, self._calm = time.monotonic(), 0.0, 0
        self._stepped = False
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def step(self) -> None:
        """The loop has got on by a step."""
        self._got_on()
        self._stepped = True

    def _got_on(self) -> None:
        now = time.monotonic()
        self._longest, self._since = max(self._longest, now - self._since), now

    @contextmanager
    def patient(self) -> Iterator[None]:
        """What happens in the block may take as long as it likes, as waiting for another rank."""
        if self._calm == 0:
            self._got_on()  # as far as here: a batch has been read
        self._calm += 1
        try:
            yield
        finally:
            self._since = time.monotonic()
            self._calm -= 1

    @contextmanager
    def lost_ranks(self) -> Iterator[None]:
        """Says in plain words that a rank has broken off a collective."""
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            raise RuntimeError(
                f"rank {self._ranks.rank}: another rank was lost; its own output says why"
            ) from error

    def __enter__(self) -> Watch:
        if self._ranks.size > 1:
            store = dist.distributed_c10d._get_default_store()
            if hasattr(store, "clone"):  # a connection of its own: a wait on the other blocks it
                store = store.clone()
            Watch._runs += 1  # the same number on every rank
            self._store = dist.PrefixStore(f"pybackdoor_watch_{Watch._runs}", store)
            self._since = time.monotonic()
            self._thread = threading.Thread(target=self._work, name="pybackdoor-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """A rank that fails by itself falls silent: the others may be waiting for it."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            if kind is None or issubclass(kind, NonFiniteError):  # which every rank raises
                with suppress(RuntimeError):
                    self._beat(_LEFT)

    def _gets_on(self) -> bool:
        if self._calm > 0 or not self._stepped:  # nobody knows how long the first step takes
            return True
        return time.monotonic() - self._since < max(self._limit, _PATIENCE * self._longest)

    def _beat(self, what: bytes) -> None:
        self._store.set(str(self._ranks.rank), what)

    def _work(self) -> None:
        others = [r for r in range(self._ranks.size) if r != self._ranks.rank]
        heard = dict.fromkeys(others, (b"", time.monotonic()))
        count, silence = 0, self._limit * _MISSED / _BEATS
        while not self._over.wait(self._limit / _BEATS):
            try:
                count += 1
                self._beat(b"%d" % count if self._gets_on() else _STUCK)
                for rank in others:
                    beat = self._store.get(str(rank)) if self._store.check([str(rank)]) else b""
                    last, when = heard[rank]
                    if beat == _STUCK:
                        self._end(f"rank {rank} hangs, or waits for one that does")
                    elif beat != last:
                        heard[rank] = beat, time.monotonic()
                    elif beat != _LEFT and time.monotonic() - when > silence:
                        self._end(f"rank {rank} has given no sign of life for {silence:g} s")
            except (RuntimeError, dist.DistError) as error:
                self._end(f"the first rank's store is gone ({str(error).splitlines()[0]})")

    def _end(self, why: str) -> None:
        if not self._over.is_set():
            print(f"pybackdoor: rank {self._ranks.rank} stops: {why}", file=sys.stderr, flush=True)
            os._exit(1)
