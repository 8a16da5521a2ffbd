"""Pairs from tables of image files, indexed: for tables too long to read at every start."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .decode import inspect_file
from .index import IndexWriter
from .indexed import Indexed
from .ondemand import shown
from .pairs import Pairs
from .preprocess import LARGEST_FILE, BrokenImage
from .tables import Row, iter_rows

_FORMAT = 1
_CHUNK = 4096  # rows written at once


def indexed_table(
    reader: Indexed,
    path: Path,
    image_keys: Sequence[str],
    caption_keys: Sequence[str],
    delimiter: str | None,
    root: str,
    progress: bool | None,
) -> Pairs:
    """Pairs over a csv or tsv file's index.

    The index depends on the table's own size and time; an image file's size and time are looked at
    when the image is wanted.
    """
    info = os.stat(path)
    spec = [_FORMAT, os.path.abspath(path), list(image_keys), list(caption_keys), delimiter, root]

    def build(writer: IndexWriter) -> dict:
        return _build(reader.op, path, image_keys, caption_keys, delimiter, root, writer, progress)

    index = reader.index(spec, [info.st_size, info.st_mtime_ns], build)
    paths = index.strings("location")
    if "image" in index.columns:
        paths = paths.take(index.array("first"))
    return reader.pairs(index, FileBytes(paths))


class FileBytes:
    """Image files by row."""

    constant = False

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths

    def stamp(self, row: int) -> int:
        """Of the file's size and time."""
        info, reason = inspect_file(self._paths[row])
        if reason or info is None:
            raise BrokenImage(reason or "no such file")
        if info.st_size > LARGEST_FILE:
            raise BrokenImage(f"{info.st_size} bytes, more than {LARGEST_FILE}")
        return (info.st_mtime_ns * 0x9E3779B97F4A7C15 + info.st_size) % 2**64

    def read(self, row: int) -> bytes:
        """The file's content."""
        try:
            return Path(self._paths[row]).read_bytes()
        except FileNotFoundError:  # since its stamp was taken
            raise BrokenImage("no such file") from None


def _build(
    op: str,
    path: Path,
    image_keys: Sequence[str],
    caption_keys: Sequence[str],
    delimiter: str | None,
    root: str,
    writer: IndexWriter,
    progress: bool | None,
) -> dict:
    from tqdm import tqdm

    records = iter_rows(op, path, image_keys, caption_keys, delimiter)
    total, ids, digests = 0, [np.empty(0, np.int64)], [np.empty((0, 2), np.uint64)]
    bar = tqdm(desc="indexing the table", unit="row", disable=not shown(progress))
    with bar:
        while some := list(itertools.islice(enumerate(records, total), _CHUNK)):
            total += len(some)
            good = [(row, record) for row, record in some if not record.bad]
            writer.append_strings("caption", (record.text for _, record in good))
            paths = [os.path.join(root, record.image) for _, record in good]
            writer.append_strings("location", paths)
            ids.append(np.array([row for row, _ in good], np.int64))
            digests.append(_digests(paths))
            writer.append_strings(
                "bad", (_bad(row, record, path, root) for row, record in some if record.bad)
            )
            bar.update(len(some))
    writer.append("id", np.concatenate(ids))
    # 128 bits tell paths apart; the paths themselves would fill the memory.
    _, first, image = np.unique(
        np.concatenate(digests), axis=0, return_index=True, return_inverse=True
    )
    if len(first) < len(image):  # files with several captions: decoded and kept once
        order = np.argsort(first)  # numbered as they appear
        number = np.empty(len(order), np.int32)
        number[order] = np.arange(len(order))
        writer.append("image", number[image.reshape(-1)])
        writer.append("first", first[order])
    return {"total": total}


def _bad(row: int, record: Row, path: Path, root: str) -> str:
    where = os.path.join(root, record.image) if record.image else os.path.abspath(path)
    return json.dumps([row, where, record.bad])


def _digests(paths: list[str]) -> np.ndarray:
    """[n, 2] uint64."""
    content = b"".join(hashlib.blake2b(os.fsencode(p), digest_size=16).digest() for p in paths)
    return np.frombuffer(content, np.uint64).reshape(-1, 2)
