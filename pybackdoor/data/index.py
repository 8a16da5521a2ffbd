"""Index files: the columns of a data set, written once and mapped into memory afterwards.

Layout, all numbers little-endian:
    0   8 bytes   b"PBINDEX1"
    8   8 bytes   length of the header
    16  32 bytes  SHA-256 of the header
    48  header    JSON: {"key", "meta", "columns": {name: [dtype, count, offset, CRC-32]}}
    ... columns   raw arrays, each at an offset that is a multiple of 64
A column of n strings is two arrays, ``name.blob`` (their UTF-8 bytes end to end) and ``name.ends``
([n + 1] int64). The key hashes all that the content depends on: the source's files with their
sizes and times, and the options. `open_index` checks every checksum (tests/stress/index_rows.py
times it on 3 million rows), `read_index` the header's alone. The file takes its name last, in one
step.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..files import atomic_file, exclusive
from .strings import Strings, packed

_MAGIC = b"PBINDEX1"
_ALIGN = 64
_BLOCK = 1 << 20
_LARGEST_HEADER = 1 << 24


@dataclass
class Index:
    """An open index file.

    Attributes:
        path: the file.
        key: what it was built from.
        meta: small facts beside the columns.
    """

    path: Path
    key: str
    meta: dict[str, Any]
    columns: dict[str, list[Any]]
    content: np.ndarray  # [file's bytes] uint8, mapped

    def array(self, name: str) -> np.ndarray:
        """A column, [count], read-only."""
        dtype, count, offset, _ = self.columns[name]
        end = offset + count * np.dtype(dtype).itemsize
        return self.content[offset:end].view(dtype)

    def strings(self, name: str) -> Strings:
        """A column of strings."""
        checksums = [self.columns[f"{name}.{part}"][3] for part in ("blob", "ends")]
        identity = f"{self.key}:{name}:{checksums}"
        blob, ends = (self.array(f"{name}.{part}") for part in ("blob", "ends"))
        return Strings(blob, ends, identity, self.path)

    def verify(self) -> None:
        """Read every column and compare its checksum.

        Raises:
            ValueError: naming the column that is damaged.
        """
        with open(self.path, "rb") as file:
            for name, (dtype, count, offset, wanted) in self.columns.items():
                file.seek(offset)
                left, got = count * np.dtype(dtype).itemsize, 0
                while left and (block := file.read(min(_BLOCK, left))):
                    got, left = zlib.crc32(block, got), left - len(block)
                if left or got != wanted:
                    raise ValueError(
                        f"index {self.path} is damaged: CRC-32 of its column {name} must be "
                        f"{wanted:#x}, got {got:#x}"
                    )


class IndexWriter:
    """Collects columns in temporary files, so that memory holds one piece of them at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._columns: dict[str, tuple[BinaryIO, str]] = {}
        self._checksums: dict[str, int] = {}
        self._counts: dict[str, int] = {}
        self._ends: dict[str, int] = {}

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def append(self, name: str, values: np.ndarray) -> None:
        """Add [n] values to a column; the first piece decides its dtype."""
        if name not in self._columns:
            file = self._stack.enter_context(tempfile.TemporaryFile(dir=self._folder))
            self._columns[name] = file, values.dtype.newbyteorder("<").str
            self._checksums[name] = self._counts[name] = 0
        file, dtype = self._columns[name]
        content = values.astype(dtype, copy=False).tobytes()
        file.write(content)
        self._checksums[name] = zlib.crc32(content, self._checksums[name])
        self._counts[name] += len(values)

    def append_strings(self, name: str, texts: Iterable[str]) -> None:
        """Add strings to a column of strings."""
        blob, ends = packed(texts)
        if name not in self._ends:
            self._ends[name] = 0
            self.append(f"{name}.ends", ends[:1])
        self.append(f"{name}.blob", blob)
        self.append(f"{name}.ends", ends[1:] + self._ends[name])
        self._ends[name] += len(blob)

    def finish(self, path: Path, key: str, meta: dict[str, Any]) -> None:
        """Write the index file."""
        columns: dict[str, list[Any]] = {}
        at = 0
        for name, (_, dtype) in self._columns.items():
            columns[name] = [dtype, self._counts[name], at, self._checksums[name]]
            at += -(-self._counts[name] * np.dtype(dtype).itemsize // _ALIGN) * _ALIGN
        # Offsets count from the file's start: the header's room is rounded up, then added.
        room = len(json.dumps([key, meta, columns])) + 64 + 20 * len(columns)
        first = -(-(48 + room) // _ALIGN) * _ALIGN
        for column in columns.values():
            column[2] += first
        header = json.dumps({"key": key, "meta": meta, "columns": columns}).encode()
        assert 48 + len(header) <= first
        with atomic_file(path) as out:
            out.write(_MAGIC + len(header).to_bytes(8, "little"))
            out.write(hashlib.sha256(header).digest() + header)
            for name, (file, _) in self._columns.items():
                out.write(bytes(columns[name][2] - out.tell()))
                file.seek(0)
                shutil.copyfileobj(file, out, _BLOCK)


def read_index(path: Path, key: str) -> Index | None:
    """Open an index; None when there is none, or one of another key.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(48)
            length = int.from_bytes(start[8:16], "little")
            if len(start) < 48 or start[:8] != _MAGIC or length > _LARGEST_HEADER:
                raise ValueError("it does not start as an index does")
            header = file.read(length)
    except FileNotFoundError:
        return None
    if hashlib.sha256(header).digest() != start[16:48]:
        raise ValueError("its header's checksum does not match")
    found = json.loads(header)
    if found["key"] != key:
        return None
    content = np.memmap(path, np.uint8, "r").view(np.ndarray)
    columns = found["columns"]
    needed = max([c[2] + c[1] * np.dtype(c[0]).itemsize for c in columns.values()], default=0)
    if len(content) < needed:
        raise ValueError(f"it must have {needed} bytes, got {len(content)}")
    return Index(path, key, found["meta"], columns, content)


def open_index(op: str, path: Path, key: str, build: Callable[[IndexWriter], dict]) -> Index:
    """The index of a key: opened, or built by one process while the others wait.

    Args:
        op: function named in errors.
        build: fills a writer and returns the meta.
    Raises:
        OSError: the folder cannot be written, saying so.
    """
    with explained(op, "index", path.parent):
        found = _intact(op, path, key, warn=False)
        if found is not None:
            return found
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open_lock(path)
    with lock:
        found = _intact(op, path, key, warn=True)
        if found is None:
            with IndexWriter(path.parent) as writer:
                meta = build(writer)
                with explained(op, "index", path.parent):
                    writer.finish(path, key, meta)
            found = read_index(path, key)
    assert found is not None
    return found


def _intact(op: str, path: Path, key: str, *, warn: bool) -> Index | None:
    try:
        found = read_index(path, key)
        if found is not None:
            found.verify()
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if warn:
            warnings.warn(
                f"{op}: index {path} is damaged ({error}); building it again",
                RuntimeWarning,
                stacklevel=3,
            )
        return None


def open_lock(path: Path) -> Any:
    """The lock beside a file, to be entered."""
    return exclusive(path.with_name(path.name + ".lock"))


@contextmanager
def explained(op: str, what: str, folder: Path) -> Iterator[None]:
    """Say of a system error which file met it and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"{op}: the {what} in {folder} could not be built: {error.strerror or error}. "
            "Choose another folder with cache_dir=, or make room",
        ) from error


def hashed(*parts: Any) -> str:
    """SHA-256 of JSON-able parts, in hexadecimal."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def file_stem(source: str, identity: str) -> str:
    """A file name that says which source it belongs to and differs between identities."""
    name = re.split(r"[/\\]", source.rstrip("/\\"))[-1]
    stem = re.sub(r"[^A-Za-z0-9.-]+", "_", name.rsplit(".", 1)[0])[:40]
    return f"{stem}-{identity[:16]}"
