"""Pairs from parquet files and Hugging Face data sets that hold the images' bytes."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .decode import inspect_file
from .index import Index, IndexWriter
from .indexed import Indexed
from .names import file_names
from .ondemand import shown
from .pairs import Pairs
from .preprocess import BrokenImage, Preprocessing, size_pair
from .remote import PATIENCE, Retry, filesystem, is_remote, states

IMAGE_KEYS = ("image", "jpg", "png", "webp")  # Hugging Face, then img2dataset
CAPTION_KEYS = ("caption", "text", "title")
_FORMAT = 1  # raise when rows are read differently
_ROWS = 1024  # captions read at once


def pairs_from_parquet(
    source: str | Path | Sequence[str | Path],
    *,
    image_size: int | tuple[int, int],
    resize_mode: str = "shortest",
    interpolation: str = "bicubic",
    image_key: str | None = None,
    caption_key: str | None = None,
    cache: str | torch.device = "disk",
    decode: str | torch.device = "cpu",
    cache_dir: str | Path | None = None,
    max_bad: float = 0.01,
    retry: Retry = PATIENCE,
    num_workers: int | None = None,
    progress: bool | None = None,
) -> Pairs:
    """Pairs from parquet files with a column of image bytes and one of captions.

    A parquet file gives single rows only by the row group, so all images are decoded before the
    first batch, row group by row group, once; broken ones are left out. Memory holds two row
    groups of images at most. Needs pyarrow: ``pip install 'pybackdoor[data]'``.

    Args:
        source: path, folder, glob or brace pattern, URL, or several of them.
        image_key: column of bytes, or of Hugging Face's {"bytes", "path"}; None = the first of
            `IMAGE_KEYS` that there is.
        caption_key: None = the first of `CAPTION_KEYS`.
        cache: "disk", "ram" or "device".
        The others as in `pairs_from_shards`.
    Raises:
        ValueError: no such columns, naming those there are; as `pairs_from_shards` else.
        ImportError: pyarrow is missing.
    """
    op = "pairs_from_parquet"
    _needed(op, "pyarrow")
    if cache == "none":
        raise ValueError(f'{op}: cache must be disk, ram or device, got "none": rows come by group')
    preprocessing = Preprocessing(size_pair(image_size), resize_mode, interpolation)
    names = file_names(op, source, ".parquet")
    reader = Indexed(op, names[0], preprocessing, cache, cache_dir, max_bad, num_workers, decode)

    def build(writer: IndexWriter) -> dict:
        return _build(op, names, retry, image_key, caption_key, writer, progress)

    index = reader.index([_FORMAT, names, image_key, caption_key], states(names, retry), build)
    return reader.pairs(index, _GroupBytes(index, names, retry)).decoded(progress)


def pairs_from_hf(
    dataset: Any,
    *,
    image_size: int | tuple[int, int],
    resize_mode: str = "shortest",
    interpolation: str = "bicubic",
    image_key: str | None = None,
    caption_key: str | None = None,
    cache: str | torch.device = "disk",
    decode: str | torch.device = "cpu",
    cache_dir: str | Path | None = None,
    max_bad: float = 0.01,
    num_workers: int | None = None,
    progress: bool | None = None,
) -> Pairs:
    """Pairs from a Hugging Face ``datasets.Dataset``; images are decoded when they are wanted.

    Needs datasets: ``pip install 'pybackdoor[data]'``. Nothing is downloaded.

    Args:
        dataset: a Dataset with an Image column (or one of bytes) and a column of captions, or a
            folder that ``save_to_disk`` wrote.
        The others as in `pairs_from_parquet`; cache may be "none" too.
    Raises:
        TypeError: another kind of dataset; ValueError: no such columns, naming those there are.
    """
    op = "pairs_from_hf"
    datasets = _needed(op, "datasets")
    if isinstance(dataset, str | Path):
        dataset = datasets.load_from_disk(os.fspath(dataset))
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"{op}: dataset must be a datasets.Dataset (one split, not streaming), got "
            f"{type(dataset).__name__}"
        )
    image, caption = _columns(op, "the dataset", dataset.column_names, image_key, caption_key)
    if isinstance(dataset.features[image], datasets.Image):
        dataset = dataset.cast_column(image, datasets.Image(decode=False))
    preprocessing = Preprocessing(size_pair(image_size), resize_mode, interpolation)
    name = f"{dataset.info.dataset_name or 'dataset'}.hf"
    reader = Indexed(op, name, preprocessing, cache, cache_dir, max_bad, num_workers, decode)

    def build(writer: IndexWriter) -> dict:
        texts = dataset.select_columns([caption]).with_format(None)
        blocks = (
            (texts[start : start + _ROWS][caption], name) for start in range(0, len(texts), _ROWS)
        )
        _write(writer, _columnar(blocks))
        return {"total": len(texts)}

    index = reader.index([_FORMAT, dataset._fingerprint, image, caption], None, build)
    return reader.pairs(index, _DatasetBytes(index, dataset.select_columns([image]), image))


class _GroupBytes:
    """Image files in parquet row groups, two groups of them held at a time."""

    constant = True

    def __init__(self, index: Index, names: list[str], retry: Retry) -> None:
        self._place = [index.array(name) for name in ("file", "group", "place")]
        self._names, self._retry, self._column = names, retry, index.meta["image"]
        self._groups: dict[tuple[int, int], Any] = {}
        self._lock = threading.Lock()

    def stamp(self, row: int) -> int:
        """0: the index's key already tells one state of the files from another."""
        return 0

    def read(self, row: int) -> bytes:
        """The file's content."""
        file, group, place = (int(column[row]) for column in self._place)
        with self._lock:
            if (file, group) not in self._groups:
                table = self._retry(self._names[file], lambda: self._group(file, group))
                while len(self._groups) > 1:
                    del self._groups[next(iter(self._groups))]
                self._groups[file, group] = table.column(0)
            column = self._groups[file, group]
        return _bytes(column[place].as_py())

    def _group(self, file: int, group: int) -> Any:
        return _parquet(self._names[file]).read_row_group(group, columns=[self._column])


class _DatasetBytes:
    """Image files in a Hugging Face data set."""

    constant = True

    def __init__(self, index: Index, dataset: Any, column: str) -> None:
        self._ids, self._dataset, self._column = index.array("id"), dataset, column

    def stamp(self, row: int) -> int:
        """0: the fingerprint tells one state from another."""
        return 0

    def read(self, row: int) -> bytes:
        """The file's content."""
        value = self._dataset[int(self._ids[row])][self._column]
        path = value.get("path") if isinstance(value, dict) and not value.get("bytes") else None
        if path:  # an image folder: the user's own files
            reason = inspect_file(path)[1]
            if reason:
                raise BrokenImage(reason)
            return Path(path).read_bytes()
        return _bytes(value)


def _bytes(value: Any) -> bytes:
    if isinstance(value, dict):
        if not value.get("bytes") and value.get("path"):
            raise BrokenImage(f"it has a path and no bytes: {value['path'][:200]}")
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise BrokenImage("it has no bytes")
    return value


def _build(
    op: str,
    names: list[str],
    retry: Retry,
    image_key: str | None,
    caption_key: str | None,
    writer: IndexWriter,
    progress: bool | None,
) -> dict[str, Any]:
    from tqdm import tqdm

    image: str | None = None
    total = 0
    for column in ("file", "group", "place"):
        writer.append(column, np.empty(0, np.int32))
    bar = tqdm(names, desc="indexing parquet", unit="file", disable=not shown(progress))

    def rows() -> Iterator[tuple[int, str | None, str, str]]:
        nonlocal image, total
        for number, name in enumerate(bar):
            try:
                file = retry(name, lambda name=name: _parquet(name))
            except (ValueError, OSError) as error:
                if is_remote(name) or isinstance(error, FileNotFoundError):
                    raise
                yield total, None, name, f"not a parquet file: {' '.join(str(error).split())}"
                total += 1
                continue
            schema = file.schema_arrow
            found, caption = _columns(op, name, schema.names, image_key, caption_key)
            _check_type(op, name, found, schema.field(found).type)
            if image not in (None, found):
                raise ValueError(f"{op}: {name} has images in {found!r}, the others in {image!r}")
            image = found
            for group in range(file.num_row_groups):
                first, count = total, file.metadata.row_group(group).num_rows
                total += count
                try:
                    table = _captions(file, name, group, caption, retry)
                    texts = table.column(0).to_pylist()
                except Exception as error:  # damaged pages raise what they like
                    # Of a remote file a lost connection and damage raise the same.
                    if is_remote(name) and isinstance(error, OSError):
                        raise
                    texts, reason = [None] * count, f"row group {group}: {type(error).__name__}"
                    yield from ((first + i, None, name, reason) for i in range(count))
                    continue
                places = []
                for place, text in enumerate(texts):
                    reason = _unusable(text)
                    yield first + place, None if reason else text, f"{name}#{first + place}", reason
                    if not reason:
                        places.append(place)
                writer.append("file", np.full(len(places), number, np.int32))
                writer.append("group", np.full(len(places), group, np.int32))
                writer.append("place", np.array(places, np.int32))

    _write(writer, rows())
    return {"total": total, "image": image}


def _captions(file: Any, name: str, group: int, column: str, retry: Retry) -> Any:
    """A row group's captions as a table; each try at a remote one opens the file anew, which
    leaves behind what an earlier try holds or has spoilt."""
    if not is_remote(name):
        return file.read_row_group(group, columns=[column])
    return retry(name, lambda: _parquet(name).read_row_group(group, columns=[column]))


def _write(writer: IndexWriter, rows: Iterator[tuple[int, str | None, str, str]]) -> None:
    """Columns from (row, caption or None, location, reason)."""
    ids: list[int] = []
    captions: list[str] = []
    locations: list[str] = []
    bad: list[str] = []

    def flush() -> None:
        writer.append("id", np.array(ids, np.int64))
        writer.append_strings("caption", captions)
        writer.append_strings("location", locations)
        writer.append_strings("bad", bad)
        for pieces in (ids, captions, locations, bad):
            pieces.clear()

    for row, caption, location, reason in rows:
        if caption is None:
            bad.append(json.dumps([row, location, reason]))
        else:
            ids.append(row)
            captions.append(caption)
            locations.append(location)
        if len(ids) + len(bad) >= _ROWS:
            flush()
    flush()


def _columnar(
    blocks: Iterator[tuple[list[Any], str]],
) -> Iterator[tuple[int, str | None, str, str]]:
    row = 0
    for texts, name in blocks:
        for text in texts:
            reason = _unusable(text)
            yield row, None if reason else text, f"{name}#{row}", reason
            row += 1


def _unusable(caption: Any) -> str:
    """Why a caption cannot be used; "" when it can."""
    if not isinstance(caption, str):
        return f"its caption is a {type(caption).__name__}" if caption is not None else "no caption"
    return "" if caption.strip() else "empty caption"


def _columns(
    op: str, where: str, names: list[str], image_key: str | None, caption_key: str | None
) -> tuple[str, str]:
    found = []
    for what, key, known in (
        ("image_key", image_key, IMAGE_KEYS), ("caption_key", caption_key, CAPTION_KEYS),
    ):  # fmt: skip
        wanted = known if key is None else (key,)
        name = next((one for one in wanted if one in names), None)
        if name is None:
            raise ValueError(
                f"{op}: {where} must have a column {' or '.join(map(repr, wanted))} ({what}=), "
                f"got the columns {names}"
            )
        found.append(name)
    return found[0], found[1]


def _check_type(op: str, where: str, column: str, kind: Any) -> None:
    import pyarrow as pa

    inner = kind
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        inner = kind.field("bytes").type
    if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
        raise ValueError(
            f"{op}: column {column!r} of {where} must hold bytes or {{bytes, path}}, got {kind}"
        )


def _parquet(name: str) -> Any:
    import pyarrow.parquet as pq

    if not is_remote(name):
        return pq.ParquetFile(name)
    system, path = filesystem(name)
    return pq.ParquetFile(system.open(path, "rb"))


def _needed(op: str, package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{op} needs {package}: pip install 'pybackdoor[data]'") from error
