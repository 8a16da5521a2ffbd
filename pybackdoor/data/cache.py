"""The uint8 image cache: every image of a source decoded once, for one size and resize.

A slot is a name for (source, preprocessing); beside each other lie
    <slot>.json         what the data is: key, shape, bad images, checksums
    <slot>.<key>.u8     the pixels, raw [n, H, W, 3]
    <slot>.lock         held while one process builds
The key hashes the list of paths with their sizes and times, the preprocessing and Pillow's version,
so data of another source, state of it or size is never read. The json takes its name last, in one
step; a reader sees a whole old cache or a whole new one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import atomic_file, exclusive, write_atomically
from .decode import decode_image, inspect_file
from .preprocess import BrokenImage, Preprocessing
from .store import CachedImages

FORMAT = 1  # raise when the decoding or the layout changes


@dataclass(frozen=True)
class Slot:
    """One cache: which source, through which preprocessing, in which folder."""

    op: str
    source: str
    preprocessing: Preprocessing
    folder: Path

    @property
    def name(self) -> str:
        height, width = self.preprocessing.image_size
        stem = re.sub(r"[^A-Za-z0-9.-]+", "_", Path(self.source).stem)[:40]
        identity = json.dumps([self.source, asdict(self.preprocessing)])
        return f"{stem}-{height}x{width}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"

    def file(self, suffix: str) -> Path:
        return self.folder / f"{self.name}.{suffix}"

    def make_folder(self) -> None:
        with self.explained():
            self.folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Say of a system error which cache met it and what to do."""
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self.op}: the image cache in {self.folder} could not be built: "
                f"{error.strerror}. Choose another folder with cache_dir=, or make room",
            ) from error


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/pybackdoor/images, or the same in ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    return base / "pybackdoor" / "images"


def open_cache(
    slot: Slot,
    paths: Sequence[str],
    on_bad: Callable[[int, str], None],
    *,
    num_workers: int | None = None,
    progress: bool | None = None,
) -> tuple[CachedImages, np.ndarray]:
    """The images of a list of files, decoded now or by an earlier call.

    Args:
        paths: distinct file names.
        on_bad: called with (position in paths, reason) for each image that cannot be used, as
            soon as it is known; may raise to stop.
        num_workers: decoding threads; None = the cores this process may use.
        progress: show a bar on stderr; None = when stderr is a terminal.
    Returns:
        The images, and [len(paths)] int64: where each path's image is in them, -1 for none.
    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"{slot.op}: num_workers must be at least 1, got {num_workers}")
    key, unusable = _key(slot, paths)
    with slot.explained():
        found = _read(slot, key, len(paths))
    if found is None:
        slot.make_folder()
        with slot.explained():
            with exclusive(slot.file("lock")) as alone:
                found = _read(slot, key, len(paths), warn=True)
                if found is None:
                    if alone:
                        _remove_leftovers(slot)
                    for index, reason in unusable.items():
                        on_bad(index, reason)
                    return _build(slot, key, paths, unusable, on_bad, num_workers, progress)
    images, where, bad = found
    for index, reason in bad.items():
        on_bad(index, reason)
    return images, where


def _key(slot: Slot, paths: Sequence[str]) -> tuple[str, dict[int, str]]:
    """Hash of all that the pixels depend on, and the files that cannot be images."""
    import PIL

    head = [FORMAT, PIL.__version__, asdict(slot.preprocessing), len(paths)]
    digest = hashlib.sha256(json.dumps(head).encode())
    unusable = {}
    for index, path in enumerate(paths):
        info, reason = inspect_file(path)
        state = f"\0{reason or ''}{info and (info.st_size, info.st_mtime_ns)}\n"
        digest.update(os.fsencode(path) + state.encode())
        if reason:
            unusable[index] = reason
    return digest.hexdigest(), unusable


def _read(
    slot: Slot, key: str, num_paths: int, *, warn: bool = False
) -> tuple[CachedImages, np.ndarray, dict[int, str]] | None:
    """(images, where, bad) of a finished cache; None when there is none for this key.

    Anything damaged is refused, with a warning when asked: the caller decodes again.
    """
    try:
        content = slot.file("json").read_bytes()
        meta = json.loads(content)
        if content != _meta_bytes({k: v for k, v in meta.items() if k != "checksum"}):
            raise ValueError("its checksum does not match")
        if meta["key"] != key:
            return None
        bad = {index: reason for index, reason in meta["bad"]}
        size = slot.preprocessing.image_size
        images = CachedImages(slot.folder / meta["data"], meta["count"], size, meta["sha256"])
        return images, _where(num_paths, bad), bad
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError) as error:
        if warn:
            warnings.warn(
                f"{slot.op}: image cache {slot.file('json')} is damaged ({error}); "
                "decoding the images again",
                RuntimeWarning,
                stacklevel=2,
            )
        return None


def _meta_bytes(meta: dict[str, Any]) -> bytes:
    body = json.dumps(meta, sort_keys=True)
    checksum = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({"checksum": checksum, **meta}, sort_keys=True, indent=1).encode() + b"\n"


def _where(num_paths: int, bad: dict[int, str]) -> np.ndarray:
    """[num_paths] int64 place of each path's image among the good ones, -1 for the bad."""
    good = np.ones(num_paths, bool)
    good[list(bad)] = False
    where = np.full(num_paths, -1, np.int64)
    where[good] = np.arange(np.count_nonzero(good))
    return where


def _build(
    slot: Slot,
    key: str,
    paths: Sequence[str],
    unusable: dict[int, str],
    on_bad: Callable[[int, str], None],
    num_workers: int | None,
    progress: bool | None,
) -> tuple[CachedImages, np.ndarray]:
    height, width = slot.preprocessing.image_size
    data = slot.file(f"{key[:16]}.u8")
    bad, digest, count = dict(unusable), hashlib.sha256(), 0
    todo = [index for index in range(len(paths)) if index not in bad]
    _check_space(slot, len(todo) * height * width * 3)
    # Written in order through a file, never through a map: a full disk is then an error, not a
    # bus error.
    with atomic_file(data) as file:
        decoded = _decoded([paths[index] for index in todo], slot.preprocessing, num_workers)
        for index, pixels in zip(todo, _bar(decoded, len(todo), progress), strict=True):
            if isinstance(pixels, BrokenImage):
                bad[index] = str(pixels)
                on_bad(index, str(pixels))
                continue
            file.write(pixels.data)
            digest.update(pixels.data)
            count += 1
    meta = {
        "format": FORMAT,
        "key": key,
        "source": slot.source,
        **asdict(slot.preprocessing),
        "count": count,
        "data": data.name,
        "sha256": digest.hexdigest(),
        "bad": sorted(bad.items()),
    }
    write_atomically(slot.file("json"), _meta_bytes(meta))
    for old in slot.folder.glob(f"{slot.name}.*.u8"):
        if old != data:
            with suppress(OSError):  # Windows keeps a file that someone has mapped
                old.unlink()
    images = CachedImages(data, count, slot.preprocessing.image_size, digest.hexdigest())
    return images, _where(len(paths), bad)


def _decoded(
    paths: list[str], preprocessing: Preprocessing, num_workers: int | None
) -> Iterator[np.ndarray | BrokenImage]:
    """Decode in threads (Pillow releases the GIL), in order, a bounded number ahead."""

    def one(path: str) -> np.ndarray | BrokenImage:
        try:
            return decode_image(path, preprocessing)
        except BrokenImage as error:
            return error

    workers = num_workers or _cores()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="pybackdoor-decode")
    try:
        waiting: deque[Any] = deque()
        for path in paths:
            waiting.append(pool.submit(one, path))
            if len(waiting) >= 8 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _bar(items: Iterator[Any], total: int, progress: bool | None) -> Iterator[Any]:
    from tqdm import tqdm

    show = sys.stderr.isatty() if progress is None else progress
    return tqdm(items, total=total, desc="decoding images", unit="img", disable=not show)


def _check_space(slot: Slot, wanted: int) -> None:
    free = shutil.disk_usage(slot.folder).free
    if free < wanted:
        raise OSError(errno.ENOSPC, f"{wanted:,} bytes are needed, {free:,} are free")


def _remove_leftovers(slot: Slot) -> None:
    """Delete what killed processes left; only with the lock held, so nobody is writing them."""
    for left in slot.folder.glob(f"{slot.name}.*.tmp"):
        with suppress(OSError):
            left.unlink()
