"""Bytes of local files and, through fsspec, of remote ones: with patience, but not without end."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

from .preprocess import BrokenImage

_ASKED_AT_ONCE = 16
_READ_AT_ONCE = 8
T = TypeVar("T")

# Trying again would not help.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, ValueError, TypeError,
          ImportError, NotImplementedError, MemoryError)  # fmt: skip


@dataclass(frozen=True)
class Retry:
    """How often and how long a remote read is tried.

    Attributes:
        attempts: tries in all, at least 1.
        first: seconds before the second try; each further wait is twice as long.
        longest: seconds that no wait exceeds.
        timeout: seconds after which one try is given up.
    """

    attempts: int = 5
    first: float = 0.5
    longest: float = 30.0
    timeout: float = 60.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or min(self.first, self.longest) < 0 or self.timeout <= 0:
            raise ValueError(f"Retry: wanted attempts >= 1, waits >= 0, timeout > 0, got {self}")

    def __call__(self, what: str, call: Callable[[], T]) -> T:
        """The result of a call; each failure but a final one is tried again.

        Raises:
            OSError: every try failed; the message says how often and the last reason.
        """
        wait = self.first
        for attempt in range(1, self.attempts + 1):
            try:
                return _within(self.timeout, call)
            except _FINAL as error:
                if isinstance(error, OSError) and what not in str(error):
                    raise type(error)(f"{what}: {error}") from error
                raise
            except Exception as error:
                if attempt == self.attempts:
                    raise OSError(
                        f"{what} could not be read in {attempt} tries: "
                        f"{type(error).__name__}: {error}"
                    ) from error
            time.sleep(min(wait, self.longest))
            wait *= 2
        raise AssertionError


PATIENCE = Retry()


def _within(seconds: float, call: Callable[[], T]) -> T:
    """A call's result, or TimeoutError; a call that hangs is left to its daemon thread."""
    done = threading.Event()
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append((True, call()))
        except BaseException as error:
            outcome.append((False, error))
        done.set()

    threading.Thread(target=work, name="pybackdoor-remote", daemon=True).start()
    if not done.wait(seconds):
        raise TimeoutError(f"no answer in {seconds:g} s")
    fine, value = outcome[0]
    if not fine:
        raise value
    return value


class File(Protocol):
    """A file that is read by place."""

    size: int
    state: list[Any]  # changes when the content does: size, and time or tag
    window: int  # bytes worth reading at once

    def read(self, offset: int, count: int) -> bytes: ...


class LocalFile:
    """A file of this machine; reading moves no position, so that threads can share it."""

    window = 4096

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        info = os.fstat(self._fd)
        self.size, self.state = info.st_size, [info.st_size, info.st_mtime_ns]

    def read(self, offset: int, count: int) -> bytes:
        """Up to count bytes; fewer only at the file's end."""
        return os.pread(self._fd, count, offset)

    def __del__(self) -> None:  # not before the last thread that reads has let go of it
        if hasattr(self, "_fd"):
            os.close(self._fd)


class RemoteFile:
    """A file that fsspec reaches."""

    window = 4 << 20

    def __init__(self, url: str, retry: Retry) -> None:
        self._url, self._retry = url, retry
        self._fs, self._path = filesystem(url)
        info = retry(url, lambda: self._fs.info(self._path))
        if info.get("size") is None:
            raise ValueError(f"{url} does not tell its size, so it cannot be read by place")
        self.size = int(info["size"])
        tags = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
        self.state = [self.size, *(str(info[tag]) for tag in tags if tag in info)]

    def read(self, offset: int, count: int) -> bytes:
        """Up to count bytes; fewer only at the file's end."""
        end = min(offset + count, self.size)
        if end <= offset:
            return b""

        def call() -> bytes:
            content = self._fs.cat_file(self._path, start=offset, end=end)
            if len(content) != end - offset:
                raise OSError(f"{end - offset} bytes were asked for, {len(content)} came")
            return content

        return self._retry(self._url, call)


def is_remote(name: str) -> bool:
    """Whether a name is a URL that fsspec is to open."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name) is not None


def open_file(name: str, retry: Retry) -> LocalFile | RemoteFile:
    """A local or remote file, open for reading by place."""
    return RemoteFile(name, retry) if is_remote(name) else LocalFile(name)


def states(names: Sequence[str], retry: Retry) -> list[list[Any]]:
    """Each file's state; remote ones are asked several at a time."""
    if not any(map(is_remote, names)):
        return [LocalFile(name).state for name in names]
    with ThreadPoolExecutor(_ASKED_AT_ONCE, "pybackdoor-remote") as pool:
        return list(pool.map(lambda name: open_file(name, retry).state, names))


def each_file(names: Sequence[str], retry: Retry, work: Callable[[File, str], T]) -> Iterator[T]:
    """What ``work`` makes of each file and its name, in order; remote ones several at a time.

    The first error in that order is raised; files behind it are given up.
    """
    if not any(map(is_remote, names)):
        for name in names:
            yield work(open_file(name, retry), name)
        return
    stop, rest = threading.Event(), iter(names)
    pool = ThreadPoolExecutor(_READ_AT_ONCE, "pybackdoor-remote")

    def one(name: str) -> T:
        return work(_Until(open_file(name, retry), stop), name)

    try:
        running = deque(pool.submit(one, name) for name in islice(rest, _READ_AT_ONCE))
        while running:
            done = running.popleft().result()
            running.extend(pool.submit(one, name) for name in islice(rest, 1))
            yield done
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)


class _Until:
    """A file that is read until nobody wants it any more."""

    def __init__(self, file: File, stop: threading.Event) -> None:
        self.size, self.state, self.window = file.size, file.state, file.window
        self._file, self._stop = file, stop

    def read(self, offset: int, count: int) -> bytes:
        if self._stop.is_set():
            raise CancelledError
        return self._file.read(offset, count)


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it."""
    try:
        import fsspec
    except ImportError as error:
        raise ImportError(f"reading {url} needs fsspec: pip install 'pybackdoor[data]'") from error
    return fsspec.core.url_to_fs(url)


class Windowed:
    """Reads a file's neighbouring bytes at once; for one thread."""

    def __init__(self, file: File) -> None:
        self._file, self._start, self._content = file, 0, b""

    def read(self, offset: int, count: int) -> bytes:
        """Up to count bytes; fewer only at the file's end."""
        count = min(count, max(self._file.size - offset, 0))
        start = offset - self._start
        if start < 0 or start + count > len(self._content):
            self._content = self._file.read(offset, max(count, self._file.window))
            self._start, start = offset, 0
        return self._content[start : start + count]


class OpenFiles:
    """Files kept open between reads, a bounded number of them; threads may share it."""

    def __init__(self, names: Any, retry: Retry, most: int = 64) -> None:
        self._names, self._retry, self._most = names, retry, most
        self._lock = threading.Lock()
        self._open: dict[int, LocalFile | RemoteFile] = {}

    def read(self, number: int, offset: int, count: int) -> bytes:
        """Exactly count bytes of a file.

        Raises:
            BrokenImage: the file is gone or shorter.
        """
        try:
            content = self._file(number).read(offset, count)
        except FileNotFoundError:
            raise BrokenImage("no such file") from None
        if len(content) != count:
            raise BrokenImage(f"{count} bytes were asked for, {len(content)} came")
        return content

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenFiles, (self._names, self._retry, self._most)

    def _file(self, number: int) -> LocalFile | RemoteFile:
        with self._lock:
            file = self._open.pop(number, None)
            if file is None:
                file = open_file(self._names[number], self._retry)
                if len(self._open) >= self._most:
                    self._open.pop(next(iter(self._open)))
            self._open[number] = file  # the last used stands last
            return file
