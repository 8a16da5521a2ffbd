"""Pairs from tables of image files, indexed: for tables too long to read at every start."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .decode import inspect_file
from .index import IndexWriter
from .ondemand import Indexed, shown
from .pairs import Pairs
from .preprocess import LARGEST_FILE, BrokenImage
from .tables import read_columns

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

    table = read_columns(op, path, image_keys, caption_keys, delimiter)
    good = np.array([row for row in range(len(table.texts)) if row not in table.bad], np.int64)
    number: dict[str, int] = {}
    image = np.array(
        [number.setdefault(table.images[row], len(number)) for row in good.tolist()], np.int32
    )
    writer.append("id", good)
    if len(number) < len(good):  # files with several captions: decoded and kept once
        writer.append("image", image)
        writer.append("first", np.unique(image, return_index=True)[1])
    writer.append_strings("caption", [])
    writer.append_strings("location", [])
    chunks = range(0, len(good), _CHUNK)
    bar = tqdm(chunks, desc="indexing the table", unit=f"x{_CHUNK}", disable=not shown(progress))
    for start in bar:
        rows = good[start : start + _CHUNK].tolist()
        writer.append_strings("caption", (table.texts[row] for row in rows))
        writer.append_strings("location", (os.path.join(root, table.images[row]) for row in rows))
    source = os.path.abspath(path)
    bad = []
    for row, reason in table.bad.items():
        where = os.path.join(root, table.images[row]) if table.images[row] else source
        bad.append(json.dumps([row, where, reason]))
    writer.append_strings("bad", bad)
    return {"total": len(table.texts)}
