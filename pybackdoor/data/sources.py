"""Pairs and labelled sets from csv and tsv files and image folders."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .decode import EXTENSIONS
from .files import FileBytes, indexed_table
from .index import explained, file_stem, hashed
from .indexed import Indexed
from .labels import class_list, label_numbers
from .ledger import Ledger
from .ondemand import RowsOf
from .pairs import Labelled, Pairs, pairs_from_labelled
from .preprocess import Preprocessing, size_pair
from .store import ImageStore, decode_all, subset_images
from .strings import Strings
from .tables import CAPTION_KEYS, IMAGE_KEYS, LABEL_KEYS, read_columns

_TABLES = (".csv", ".tsv")


def pairs_from_csv(
    path: str | Path,
    *,
    image_size: int | tuple[int, int],
    resize_mode: str = "shortest",
    interpolation: str = "bicubic",
    image_key: str | None = None,
    caption_key: str | None = None,
    delimiter: str | None = None,
    root: str | Path | None = None,
    cache: str | torch.device = "disk",
    decode: str | torch.device = "cpu",
    cache_dir: str | Path | None = None,
    max_bad: float = 0.01,
    num_workers: int | None = None,
    progress: bool | None = None,
) -> Pairs:
    """Pairs from a csv or tsv file with a header.

    The table is read once into an index. A row with an empty caption or another number of fields
    than the header is left out, counted and written to the ledger. Images are decoded when they
    are wanted; a broken one is counted then, and `PairLoader` puts another pair in its place.
    ``pairs.decoded()`` decodes all of them now and leaves the broken ones out.

    Args:
        path: the file; ``image,caption`` and ``filepath<tab>title`` are known headers.
        image_size: pixels, one side or (height, width).
        resize_mode, interpolation: as in `Preprocessing`.
        image_key, caption_key: column names, when the header has others.
        delimiter: None = tab or comma, whichever gives the columns.
        root: folder of relative image paths; None = the file's own.
        cache: where decoded images are kept: "disk", "ram", "device" (this process's GPU, or a
            torch.device; "ram" where it is the CPU) or "none".
        decode: where JPEGs are decoded: "cpu" (Pillow, as CLIP's own transform does), or a GPU by
            nvJPEG, faster, of pixels some levels off: "device" (this process's GPU; the CPU where
            there is none) or a torch.device. Other files are always Pillow's.
        cache_dir: None = `default_cache_dir()`.
        max_bad: share of the rows that may be bad, in [0, 1]; 0 for evaluation.
        num_workers: decoding threads; None = one per core.
        progress: show a bar; None = on a terminal.
    Raises:
        ValueError: columns missing, text not UTF-8, more bad rows than max_bad allows.
        OSError: file unreadable, cache folder not writable, disk full.
    """
    op, path = "pairs_from_csv", Path(path)
    keys = _keys(image_key, IMAGE_KEYS), _keys(caption_key, CAPTION_KEYS)
    preprocessing = Preprocessing(size_pair(image_size), resize_mode, interpolation)
    folder = os.path.abspath(path.parent if root is None else root)
    indexed = Indexed(
        op, os.path.abspath(path), preprocessing, cache, cache_dir, max_bad, num_workers,
        decode,
    )  # fmt: skip
    return indexed_table(indexed, path, *keys, delimiter, folder, progress)


def labelled_from_csv(
    path: str | Path,
    *,
    image_size: int | tuple[int, int],
    classes: Sequence[str] | None = None,
    resize_mode: str = "shortest",
    interpolation: str = "bicubic",
    image_key: str | Sequence[str] | None = None,
    label_key: str | None = None,
    delimiter: str | None = None,
    root: str | Path | None = None,
    cache_dir: str | Path | None = None,
    max_bad: float | None = None,
    num_workers: int | None = None,
    progress: bool | None = None,
) -> Labelled:
    """A labelled set from a csv or tsv file with an image and a label column.

    Args:
        classes: class names in order; None = the labels' names, sorted. Labels are names, or
            numbers into classes.
        image_key, label_key: column names, when the header has others; of several of the images,
            the first that it has.
        max_bad: None = any bad row is an error; a share of the rows = leave out that many at
            most, counted in ``num_bad`` and listed in ``ledger``.
        The others as in `pairs_from_csv`.
    Raises:
        ValueError: as `pairs_from_csv`; also a label that is not in classes, named.
    """
    op, path = "labelled_from_csv", Path(path)
    table = read_columns(
        op, path, _keys(image_key, IMAGE_KEYS), _keys(label_key, LABEL_KEYS), delimiter
    )
    good = [row for row in range(len(table.texts)) if row not in table.bad]
    if not good:
        raise ValueError(f"{op}: {path} has no usable rows; row 0: {table.bad[0]}")
    names, numbers = label_numbers(
        op, [table.texts[row].strip() for row in good], classes,
        lambda i: f"row {good[i]} (line {table.lines[good[i]]}) of {path}",
    )  # fmt: skip
    labels = np.zeros(len(table.texts), np.int64)
    labels[good] = numbers
    reader = _Reader(
        op, os.path.abspath(path), Preprocessing(size_pair(image_size), resize_mode, interpolation),
        "disk", cache_dir, max_bad or 0.0, num_workers, progress,
    )  # fmt: skip
    images, rows, ledger, locations = reader.read(_resolved(table.images, path, root), table.bad)
    return Labelled(images, labels[rows], names, rows, locations, ledger)


def labelled_from_folder(
    root: str | Path,
    *,
    image_size: int | tuple[int, int],
    classes: Sequence[str] | Mapping[str, str] | None = None,
    resize_mode: str = "shortest",
    interpolation: str = "bicubic",
    cache_dir: str | Path | None = None,
    max_bad: float | None = None,
    num_workers: int | None = None,
    progress: bool | None = None,
) -> Labelled:
    """A labelled set from ``root/class name/*.jpg``, sub-folders included.

    Hidden files and files without an image's extension are no images.

    Args:
        root: folder of one folder per class.
        classes: folder names in order, or {folder name: class name}; None = all, sorted.
        The others as in `labelled_from_csv`.
    Raises:
        ValueError: no class folders, no images, or a folder that is not in classes.
    """
    return _from_folder(
        "labelled_from_folder", root, classes,
        Preprocessing(size_pair(image_size), resize_mode, interpolation),
        "disk", cache_dir, max_bad or 0.0, num_workers, progress,
    )  # fmt: skip


def pairs_from_folder(
    root: str | Path,
    *,
    image_size: int | tuple[int, int],
    templates: Any,
    classes: Sequence[str] | Mapping[str, str] | None = None,
    seed: int = 0,
    resize_mode: str = "shortest",
    interpolation: str = "bicubic",
    cache: str | torch.device = "disk",
    decode: str | torch.device = "cpu",
    cache_dir: str | Path | None = None,
    max_bad: float = 0.01,
    num_workers: int | None = None,
    progress: bool | None = None,
) -> Pairs:
    """Pairs from ``root/class name/*.jpg``, captioned by prompt templates.

    All images are decoded at once, to leave out the broken ones; with ``cache="none"`` again
    whenever they are wanted.

    Args:
        root, classes: as in `labelled_from_folder`.
        templates, seed: as in `pairs_from_labelled`.
        The others as in `pairs_from_csv`.
    """
    labelled = _from_folder(
        "pairs_from_folder", root, classes,
        Preprocessing(size_pair(image_size), resize_mode, interpolation),
        cache, cache_dir, max_bad, num_workers, progress, decode,
    )  # fmt: skip
    return pairs_from_labelled(labelled, templates, seed)


@dataclass(frozen=True)
class _Reader:
    """Image files into the cache, with a ledger of the rows that are left out."""

    op: str
    source: str
    preprocessing: Preprocessing
    cache: str | torch.device
    cache_dir: str | Path | None
    max_bad: float
    num_workers: int | None
    progress: bool | None
    decode: str | torch.device = "cpu"

    def read(
        self, paths: list[str], bad: Mapping[int, str]
    ) -> tuple[ImageStore, np.ndarray, Ledger, list[str]]:
        """Images, [n] rows, ledger and locations of the usable rows.

        A file that several rows name is decoded once.

        Args:
            paths: per row; "" for a row that names none.
            bad: {row: reason} known beforehand.
        """
        indexed = Indexed(
            self.op, self.source, self.preprocessing, self.cache, self.cache_dir, self.max_bad,
            self.num_workers, self.decode,
        )  # fmt: skip
        usable = np.array([row for row in range(len(paths)) if row not in bad], np.int64)
        number: dict[str, int] = {}
        file_of = np.array(
            [number.setdefault(paths[row], len(number)) for row in usable.tolist()], np.int64
        )
        files = Strings.of(number)
        name = file_stem(self.source, hashed(self.source))
        place = indexed.place(name, hashed(list(number)))
        with explained(self.op, "image cache", place.parent):
            place.parent.mkdir(parents=True, exist_ok=True)
        known = [(row, paths[row] or self.source, reason) for row, reason in bad.items()]
        ledger = indexed.ledger(place, len(paths), known)
        images = indexed.store(place, FileBytes(files), files, RowsOf(usable, file_of), ledger)
        good = np.flatnonzero(decode_all(images, self.progress)[file_of])
        ledger.save()
        if not len(good):
            raise ValueError(f"{self.op}: {self.source} has no usable rows, ledger: {ledger.path}")
        rows = usable[good]
        locations = [paths[row] for row in rows.tolist()]
        return subset_images(images, file_of[good]), rows, ledger, locations


def _from_folder(
    op: str,
    root: str | Path,
    classes: Sequence[str] | Mapping[str, str] | None,
    preprocessing: Preprocessing,
    cache: str | torch.device,
    cache_dir: str | Path | None,
    max_bad: float,
    num_workers: int | None,
    progress: bool | None,
    decode: str | torch.device = "cpu",
) -> Labelled:
    source = os.path.abspath(root)
    names = sorted(os.listdir(source))
    folders = [n for n in names if n[0] != "." and os.path.isdir(os.path.join(source, n))]
    if len(folders) < (2 if classes is None else 1):
        tables = [name for name in names if name.endswith(_TABLES)]
        hint = f"; did you mean {os.path.join(source, tables[0])}?" if tables else ""
        raise ValueError(
            f"{op}: root must hold one folder per class, two at least where classes are not given; "
            f"{source} holds {folders or 'none'}{hint}"
        )
    if isinstance(classes, Mapping):
        in_order, names = list(classes), class_list(op, list(classes.values()))
    else:
        in_order = names = class_list(op, folders if classes is None else classes)
    label_of = {folder: i for i, folder in enumerate(in_order)}
    paths: list[str] = []
    labels: list[int] = []
    for folder in folders:
        if folder not in label_of:
            raise ValueError(
                f"{op}: folder {folder!r} of {source} is not in classes, which are "
                f"{list(label_of)[:10]}{' ...' if len(label_of) > 10 else ''}"
            )
        found = _image_files(os.path.join(source, folder))
        paths += found
        labels += [label_of[folder]] * len(found)
    if not paths:
        raise ValueError(f"{op}: no image files in the class folders of {source}")
    reader = _Reader(
        op, source, preprocessing, cache, cache_dir, max_bad, num_workers, progress, decode
    )
    images, rows, ledger, locations = reader.read(paths, {})
    return Labelled(images, np.array(labels)[rows], names, rows, locations, ledger)


def _image_files(folder: str) -> list[str]:
    found = []
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in files:
            if name[0] != "." and os.path.splitext(name)[1][1:].lower() in EXTENSIONS:
                found.append(os.path.join(where, name))
    return sorted(found)


def _keys(explicit: str | Sequence[str] | None, known: Sequence[str]) -> Sequence[str]:
    if explicit is None:
        return known
    return (explicit,) if isinstance(explicit, str) else explicit


def _resolved(images: list[str], table: Path, root: str | Path | None) -> list[str]:
    folder = os.path.abspath(table.parent if root is None else root)
    return [os.path.join(folder, image) if image else "" for image in images]
