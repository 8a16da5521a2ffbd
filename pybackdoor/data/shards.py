"""Pairs from tar shards as webdataset and img2dataset write them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .decode import EXTENSIONS
from .index import Index, IndexWriter
from .indexed import Indexed
from .names import file_names
from .ondemand import shown
from .pairs import Pairs
from .preprocess import LARGEST_FILE, Preprocessing, size_pair
from .remote import PATIENCE, File, OpenFiles, Retry, Windowed, each_file, states
from .tar import Flaw, Member, scan

_TEXTS = ("txt", "caption")  # the first of these, else the "caption" of json
_LONGEST_TEXT = 1 << 20  # bytes of a caption or json member
# Where an image is, in one record: a random row then touches one page of the index.
_PLACE = np.dtype([("shard", "<i4"), ("size", "<i4"), ("offset", "<i8")])
_FORMAT = 1  # raise when other members are chosen or captions read differently


def pairs_from_shards(
    source: str | Path | Sequence[str | Path],
    *,
    image_size: int | tuple[int, int],
    resize_mode: str = "shortest",
    interpolation: str = "bicubic",
    cache: str | torch.device = "disk",
    decode: str | torch.device = "cpu",
    cache_dir: str | Path | None = None,
    max_bad: float = 0.01,
    retry: Retry = PATIENCE,
    num_workers: int | None = None,
    progress: bool | None = None,
) -> Pairs:
    """Pairs from webdataset or img2dataset tar shards.

    A sample is a run of members whose names agree up to the first dot of their last part. Its
    image is the first member with an image's extension; its caption is that of ``.txt``,
    ``.caption``, or ``"caption"`` in ``.json``, in this order. Other members are passed over and
    counted in ``pairs.ledger.skipped``. The shards are scanned once into an index, headers and
    captions only; images are decoded when they are wanted. Nothing is extracted, unpickled or run.

    Cut shards, damaged headers, wrong sizes, links, devices, names that leave the folder, keys
    that occur twice, and samples without image or caption are left out and written to the ledger.
    Rows count the samples and flaws of all shards in order.

    Args:
        source: path, folder, glob or brace pattern (``{00000..00010}``), URL that fsspec opens,
            or several of them. A remote shard is read once whole for the index, eight at a time.
        image_size: pixels, one side or (height, width).
        resize_mode, interpolation: as in `Preprocessing`.
        cache: where decoded images are kept: "disk", "ram", "device" (this process's GPU, or a
            torch.device; "ram" where it is the CPU) or "none".
        decode: where JPEGs are decoded: "cpu" (Pillow, as CLIP's own transform does), or a GPU by
            nvJPEG, faster, of pixels some levels off: "device" (this process's GPU; the CPU where
            there is none) or a torch.device. Other files are always Pillow's.
        cache_dir: of the index and the images; None = `default_cache_dir()`.
        max_bad: share of the rows that may be bad, in [0, 1].
        retry: patience with remote files.
        num_workers: decoding threads; None = one per core.
        progress: show a bar while scanning; None = on a terminal.
    Raises:
        ValueError: no shards, no usable sample, more bad rows than max_bad allows.
        OSError: a shard is missing or stays unreadable, cache folder not writable, disk full.
    """
    op = "pairs_from_shards"
    preprocessing = Preprocessing(size_pair(image_size), resize_mode, interpolation)
    names = file_names(op, source, ".tar")
    reader = Indexed(
        op, str(names[0]), preprocessing, cache, cache_dir, max_bad, num_workers, decode
    )
    known = states(names, retry)
    index = reader.index(
        [_FORMAT, names], known, lambda writer: _build(op, names, retry, writer, progress)
    )
    pairs = reader.pairs(index, _ShardBytes(index, names, retry))
    assert pairs.ledger is not None
    pairs.ledger.skipped = index.meta["skipped"]
    return pairs


class _ShardBytes:
    """The image files of an index's rows, each a piece of a shard."""

    constant = True

    def __init__(self, index: Index, names: list[str], retry: Retry) -> None:
        self._place = index.array("place").view(_PLACE)
        self._files = OpenFiles(names, retry)

    def read(self, row: int) -> bytes:
        """The file's content."""
        shard, size, offset = self._place[row].item()
        return self._files.read(shard, offset, size)

    def stamp(self, row: int) -> int:
        """0: the index's key already tells one state of the shards from another."""
        return 0


def _build(
    op: str, names: list[str], retry: Retry, writer: IndexWriter, progress: bool | None
) -> dict[str, Any]:
    from tqdm import tqdm

    row = 0
    skipped: Counter[str] = Counter()
    with closing(each_file(names, retry, read_shard)) as shards:
        bar = tqdm(
            shards, desc="indexing shards", unit="shard", total=len(names),
            disable=not shown(progress),
        )  # fmt: skip
        for number, found in enumerate(bar):
            rows = row + np.array(found.rows, np.int64)
            writer.append("id", rows)
            place = np.empty(len(rows), _PLACE)
            place["shard"], place["size"], place["offset"] = number, found.sizes, found.offsets
            writer.append("place", place.view(np.uint8))
            writer.append_strings("caption", found.captions)
            writer.append_strings("location", found.locations)
            writer.append_strings(
                "bad", [json.dumps([row + at, where, reason]) for at, where, reason in found.bad]
            )
            row += found.count
            skipped.update(found.skipped)
    return {"total": row, "skipped": dict(skipped.most_common(100))}


@dataclass
class Shard:
    """What a shard holds: the usable samples as columns, and the rest.

    Attributes:
        rows: of the samples, counted from the shard's first.
        bad: (row, location, reason).
        count: rows in all.
        skipped: members passed over, by extension.
    """

    rows: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    locations: list[str] = field(default_factory=list)
    bad: list[tuple[int, str, str]] = field(default_factory=list)
    count: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def next_row(self) -> int:
        self.count += 1
        return self.count - 1


@dataclass
class _Sample:
    key: str
    row: int
    image: Member | None = None
    texts: dict[str, Any] = field(default_factory=dict)  # extension -> bytes, or _Unusable
    flaw: str = ""


class _Unusable(ValueError):
    """Why a sample cannot be used."""


def read_shard(file: File, name: str) -> Shard:
    """Scan a shard."""
    window = Windowed(file)
    shard = Shard()
    sample: _Sample | None = None
    seen: set[str] = set()
    for item in scan(window.read, file.size):
        key, extension = _split(item.name)
        if isinstance(item, Flaw) and not (item.name and extension):
            where = f"{name}#{item.name or f'byte {item.at}'}"
            shard.bad.append((shard.next_row(), where, item.reason))
            continue
        if unsafe := _unsafe(item.name):
            shard.bad.append((shard.next_row(), f"{name}#{item.name}", unsafe))
            continue
        if not extension or key.rsplit("/", 1)[-1].startswith("__"):
            shard.skipped[extension or "no extension"] += 1
            continue
        if sample is None or sample.key != key:
            _close(shard, sample, name)
            sample = _Sample(key, shard.next_row())
            if key in seen:
                sample.flaw = "its key occurs twice in the shard"
            seen.add(key)
        if isinstance(item, Flaw):
            sample.flaw = sample.flaw or f".{extension}: {item.reason}"
        elif extension in EXTENSIONS and sample.image is None:
            sample.image = item
        elif extension in (*_TEXTS, "json") and extension not in sample.texts:
            sample.texts[extension] = _content(item, extension, window)
        elif extension in sample.texts or extension in EXTENSIONS:
            if extension in sample.texts or _split(sample.image.name)[1] == extension:
                reason = "a second member of the same name"
                shard.bad.append((shard.next_row(), f"{name}#{item.name}", reason))
            else:
                shard.skipped[extension] += 1
        else:
            shard.skipped[extension] += 1
    _close(shard, sample, name)
    return shard


def _close(shard: Shard, sample: _Sample | None, name: str) -> None:
    """Put a sample among the usable or the bad ones."""
    if sample is None:
        return
    try:
        if sample.flaw:
            raise _Unusable(sample.flaw)
        if sample.image is None:
            raise _Unusable("it has no image")
        if sample.image.size == 0:
            raise _Unusable("its image has zero bytes")
        if sample.image.size > LARGEST_FILE:
            raise _Unusable(f"its image has {sample.image.size} bytes")
        caption = _caption(sample)
    except _Unusable as error:
        shard.bad.append((sample.row, f"{name}#{sample.key}", str(error)))
        return
    shard.rows.append(sample.row)
    shard.offsets.append(sample.image.offset)
    shard.sizes.append(sample.image.size)
    shard.captions.append(caption)
    shard.locations.append(f"{name}#{sample.image.name}")


def _content(member: Member, extension: str, window: Windowed) -> bytes | _Unusable:
    """A text member's bytes, read while they are near: its header has just been."""
    if member.size > _LONGEST_TEXT:
        return _Unusable(f"its .{extension} has {member.size} bytes")
    return window.read(member.offset, member.size)


def _caption(sample: _Sample) -> str:
    for extension in (*_TEXTS, "json"):
        content = sample.texts.get(extension)
        if content is None:
            continue
        if isinstance(content, _Unusable):
            raise content
        text = _json_caption(content) if extension == "json" else content
        if text is None:
            continue
        try:
            text = text.decode() if isinstance(text, bytes) else text
            text.encode()  # JSON can spell what UTF-8 cannot
        except UnicodeError:
            raise _Unusable(f"its .{extension} is not UTF-8") from None
        if not text.strip():
            raise _Unusable(f"its .{extension} holds an empty caption")
        return text
    raise _Unusable("it has no caption")


def _json_caption(content: bytes) -> str | None:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _Unusable(f"its .json cannot be read: {type(error).__name__}") from None
    caption = found.get("caption") if isinstance(found, dict) else None
    if caption is not None and not isinstance(caption, str):
        raise _Unusable(f'"caption" of its .json is a {type(caption).__name__}')
    return caption


def _split(name: str) -> tuple[str, str]:
    """(key, extension): a name up to the first dot of its last part, and after it, lower case."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, _, extension = last.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _unsafe(name: str) -> str:
    """Why a member must not be used for its name alone; "" when it may."""
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[/\\]", name):
        return "its name is an absolute path"
    if ".." in re.split(r"[/\\]", name):
        return "its name leaves the folder"
    return ""
