"""Images decoded when they are first wanted, in threads, and kept for the next time."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .decode import decode_bytes
from .index import open_lock
from .ledger import Ledger, append_line
from .preprocess import BrokenImage, Preprocessing
from .rows import DeviceRows, DiskRows, Rows
from .store import check_indices


class ImageSource(Protocol):
    """Image files by row."""

    constant: bool  # whether no stamp can change while the source is open

    def stamp(self, row: int) -> int:
        """[0, 2^64): changes with the file; raises BrokenImage when there is none."""
        ...

    def read(self, row: int) -> bytes:
        """The file's content; raises BrokenImage when it cannot be had."""
        ...


Ahead = Mapping[int, tuple[int, np.ndarray]]  # row: stamp of the file, pixels


class OnDemandImages:
    """N images, decoded in threads when first taken and kept in a `Rows`.

    A broken image is counted in the ledger once, and remembered. `take` refuses it with
    `BrokenImage`; `attempt` says which ones are broken, and `PairLoader` puts other pairs in
    their place.

    Args:
        source: the files.
        preprocessing: from a file to its pixels.
        rows: where decoded images are kept.
        locations: N strings, for messages.
        rows_of: the rows in the source that an image stands for, by the image's number.
        ledger: counts the rows of the broken ones.
        memory: file that remembers the broken ones between runs; None = nothing does.
        num_workers: decoding threads; None = the cores this process may use.
        jpegs: decodes what it can of {row: content}, before Pillow gets the rest.
    """

    def __init__(
        self,
        source: ImageSource,
        preprocessing: Preprocessing,
        rows: Rows,
        *,
        locations: Sequence[str],
        rows_of: RowsOf,
        ledger: Ledger,
        memory: Path | None = None,
        num_workers: int | None = None,
        jpegs: Callable[[Mapping[int, bytes]], dict[int, np.ndarray]] | None = None,
    ) -> None:
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"{ledger.op}: num_workers must be at least 1, got {num_workers}")
        self.image_size = preprocessing.image_size
        self._source, self._preprocessing, self._rows = source, preprocessing, rows
        self._locations, self._rows_of, self._ledger = locations, rows_of, ledger
        self._memory, self._workers, self._jpegs = memory, num_workers or cores(), jpegs
        self._lock = threading.Lock()
        self._broken: dict[int, tuple[int | None, str]] = {}  # row -> (stamp, reason)
        self._pool: ThreadPoolExecutor | None = None
        self._pid = os.getpid()
        self._recall()

    def __len__(self) -> int:
        return len(self._locations)

    def take(self, indices: Any) -> np.ndarray:
        """[n, H, W, 3] uint8 copy.

        Raises:
            BrokenImage: one of them cannot be decoded.
        """
        rows = check_indices(indices, len(self))
        pixels, bad = self.attempt(rows)
        for at, reason in bad.items():
            raise BrokenImage(
                f"image {rows[at]} ({self._locations[int(rows[at])]}) cannot be used: {reason}; "
                "Pairs.decoded() leaves such images out"
            )
        return pixels

    def attempt(self, indices: Any) -> tuple[np.ndarray, dict[int, str]]:
        """The images at [n] indices, and which of them are broken.

        Returns:
            [n, H, W, 3] uint8, and {place in indices: reason}; a broken image's pixels are
            undefined.
        Raises:
            ValueError: more images are broken than the ledger allows.
            OSError: a remote file stays out of reach.
        """
        rows = check_indices(indices, len(self))
        out = np.empty((len(rows), *self.image_size, 3), np.uint8)
        numbers = rows.tolist()
        bad: dict[int, str] = {}

        _, first, of = np.unique(rows, return_index=True, return_inverse=True)
        own = first[of]  # [n] the first place of the same image: only that one is decoded
        places = np.sort(first).tolist()
        ahead = self._ahead([numbers[place] for place in places])

        def fill(place: int) -> None:
            reason = self._one(numbers[place], out[place], ahead)
            if reason:
                bad[place] = reason

        self._each(fill, places)
        for place in np.flatnonzero(own != np.arange(len(rows))).tolist():
            out[place] = out[own[place]]
            if own[place] in bad:
                bad[place] = bad[int(own[place])]
        return out, dict(sorted(bad.items()))

    def _ahead(self, rows: list[int]) -> Ahead:
        """What is decoded all at once, of the rows that are not kept."""
        if self._jpegs is None:
            return {}
        read: dict[int, tuple[int, bytes]] = {}

        def fetch(row: int) -> None:
            with suppress(BrokenImage):  # which is said when it is the row's turn
                stamp = self._source.stamp(row)
                broken = self._broken.get(row, (None, ""))[0] == stamp
                if not (broken or self._rows.has(row, stamp)):
                    read[row] = stamp, self._source.read(row)

        self._each(fetch, rows)
        pixels = self._jpegs({row: content for row, (_, content) in read.items()})
        return {row: (read[row][0], image) for row, image in pixels.items()}

    def _each(self, call: Callable[[int], None], items: Sequence[int]) -> None:
        """Call for each item, in threads."""
        todo = iter(items)  # shared: the threads keep side by side in the source

        def work() -> None:
            for item in todo:
                call(item)

        if min(self._workers, len(items)) < 2:
            return work()
        working = [self._threads().submit(work) for _ in range(self._workers)]
        try:
            for one in working:
                one.result()
        except BaseException:
            deque(todo, maxlen=0)  # so that the others stop
            wait(working)
            raise

    def gather(self, indices: Any) -> tuple[Tensor, dict[int, str]]:
        """As `attempt`, with the images on the device where they are kept, else on the CPU."""
        if not isinstance(self._rows, DeviceRows):
            images, bad = self.attempt(indices)
            return torch.from_numpy(images), bad
        rows = check_indices(indices, len(self))
        new = [place for place, row in enumerate(rows.tolist()) if not self._has(row)]
        _, bad = self.attempt(rows[new])
        return self._rows.gather(rows), {new[at]: reason for at, reason in bad.items()}

    def pending(self) -> np.ndarray:
        """[N] bool: which images are neither kept nor known to be broken, and may be either."""
        if self._source.constant:
            mask = ~self._rows.kept()
            mask[list(self._broken)] = False
            return mask
        mask = np.ones(len(self), bool)
        for row in range(len(self)):
            with suppress(BrokenImage):
                stamp = self._source.stamp(row)
                known = self._broken.get(row, (None, ""))[0] == stamp
                mask[row] = not (known or self._rows.has(row, stamp))
        return mask

    def _has(self, row: int) -> bool:
        try:
            return self._rows.has(row, self._source.stamp(row))
        except BrokenImage:
            return False

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the cache's lock, so that of several processes one decodes everything."""
        with ExitStack() as stack:
            if isinstance(self._rows, DiskRows):
                with suppress(OSError):  # read-only media
                    stack.enter_context(open_lock(self._rows.path))
            yield

    def broken(self) -> np.ndarray:
        """[N] bool: which images are known to be broken."""
        mask = np.zeros(len(self), bool)
        mask[list(self._broken)] = True
        return mask

    def _one(self, row: int, out: np.ndarray, ahead: Ahead) -> str | None:
        """Fill out with a row's image, or say why not."""
        stamp = None
        try:
            stamp = self._source.stamp(row)
            known = self._broken.get(row)
            if known is not None and known[0] == stamp:
                return known[1]
            if not self._rows.get(row, stamp, out):
                of, pixels = ahead.get(row, (None, None))
                if pixels is None or of != stamp:
                    pixels = decode_bytes(self._source.read(row), self._preprocessing)
                self._rows.put(row, stamp, pixels)
                out[...] = pixels
            self._broken.pop(row, None)  # a file mended since
            return None
        except BrokenImage as error:
            reason = str(error)
        with self._lock:
            if self._broken.get(row) != (stamp, reason):
                new = row not in self._broken
                self._broken[row] = stamp, reason
                if self._memory is not None:
                    with suppress(OSError):  # a cache on read-only media stays usable
                        append_line(self._memory, [row, stamp, reason])
                if new:
                    self._count(row, reason, write=True)
        return reason

    def _recall(self) -> None:
        """Take what earlier runs found broken; a file that has changed since is looked at anew."""
        if self._memory is None or not self._memory.exists():
            return
        for line in self._memory.read_bytes().splitlines():
            try:
                row, stamp, reason = json.loads(line)
                if not 0 <= row < len(self) or self._source.stamp(row) != stamp:
                    continue
            except (ValueError, TypeError):  # half a line, or a file that is gone
                continue
            if row not in self._broken:
                self._broken[row] = stamp, str(reason)
                self._count(row, str(reason), write=False)

    def _count(self, image: int, reason: str, *, write: bool) -> None:
        for row in self._rows_of(image):
            self._ledger.add(row, self._locations[image], reason, write=write)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lock": None, "_pool": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None or self._pid != os.getpid():  # threads do not survive a fork
                self._pid = os.getpid()
                self._pool = ThreadPoolExecutor(self._workers, "pybackdoor-decode")
            return self._pool


class RowsOf:
    """Which rows of the source stand for an image; sorted when first asked.

    Args:
        ids: [N] rows in the source.
        image_of: [N] image of each; None = each its own.
    """

    def __init__(self, ids: np.ndarray, image_of: np.ndarray | None = None) -> None:
        self._ids, self._of = ids, image_of
        self._order: np.ndarray | None = None

    def __call__(self, image: int) -> list[int]:
        if self._of is None:
            return [int(self._ids[image])]
        if self._order is None:
            self._order = np.argsort(self._of, kind="stable")
            self._sorted = self._of[self._order]
        start, stop = np.searchsorted(self._sorted, [image, image + 1])
        return self._ids[self._order[start:stop]].tolist()


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def shown(progress: bool | None) -> bool:
    """Whether to show a progress bar."""
    return sys.stderr.isatty() if progress is None else progress
