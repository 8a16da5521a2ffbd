"""Reading csv and tsv files: which separator, which columns, which rows are usable."""

from __future__ import annotations

import csv
import io
import itertools
import os
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TextIO

IMAGE_KEYS = ("image", "filepath")  # CleanCLIP and PAR, open_clip
CAPTION_KEYS = ("caption", "title")
LABEL_KEYS = ("label",)


@dataclass
class Columns:
    """Two columns of a table; a row's number counts records after the header, from 0.

    Attributes:
        images: path as written, per row; "" for a bad row.
        texts: caption or label, per row; "" for a bad row.
        bad: {row: reason}.
        lines: line of the file on which each row starts, from 1.
    """

    images: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)
    lines: list[int] = field(default_factory=list)


def read_columns(
    op: str,
    path: Path,
    image_keys: Sequence[str],
    text_keys: Sequence[str],
    delimiter: str | None = None,
) -> Columns:
    """Read the image column and one text column, as `iter_rows` does, into lists."""
    columns = Columns()
    for row, record in enumerate(iter_rows(op, path, image_keys, text_keys, delimiter)):
        columns.images.append(record.image)
        columns.texts.append(record.text)
        columns.lines.append(record.line)
        if record.bad:
            columns.bad[row] = record.bad
    return columns


class Row(NamedTuple):
    """A record of a table: the line it starts on, its two fields, and why it cannot be used."""

    line: int
    image: str
    text: str
    bad: str


def iter_rows(
    op: str,
    path: Path,
    image_keys: Sequence[str],
    text_keys: Sequence[str],
    delimiter: str | None = None,
) -> Iterator[Row]:
    """The records of a table, one at a time.

    Args:
        op: function named in errors.
        path: csv or tsv file, UTF-8 with or without byte order mark, first row a header.
        image_keys, text_keys: names, the first that the header has is read.
        delimiter: one character; None = tab or comma, whichever gives these columns.
    Raises:
        ValueError: no such columns, no rows, text that is not UTF-8, a quote never closed.
    """
    if delimiter is not None and len(delimiter) != 1:
        raise ValueError(f"{op}: delimiter must be one character, got {delimiter!r}")
    # Bytes that are not UTF-8 become lone surrogates: harmless in a path, which the system takes
    # back as bytes, and refused in a text, with its row.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = file.readline()
        if not _is_utf8(first):
            raise ValueError(f"{op}: the header of {path} is not UTF-8")
        header, separator = _header(first, image_keys, text_keys, delimiter)
        image_at, text_at = (
            next((header.index(key) for key in keys if key in header), None)
            for keys in (image_keys, text_keys)
        )
        if image_at is None or text_at is None:
            raise ValueError(
                f"{op}: {path} must have a column {_either(image_keys)} and a column "
                f"{_either(text_keys)}, got the header {header}"
            )
        row = -1
        for line, fields in _records(op, path, file, separator):
            row += 1
            image = text = bad = ""
            if len(fields) != len(header):
                bad = f"line {line} has {len(fields)} fields, the header {len(header)}"
            else:
                image, text = fields[image_at], fields[text_at]
                if not _is_utf8(text):
                    raise ValueError(
                        f"{op}: {header[text_at]} of row {row} (line {line}) of {path} is not UTF-8"
                    )
                if not image.strip():
                    bad = f"empty {header[image_at]}"
                elif not text.strip():
                    bad = f"empty {header[text_at]}"
            yield Row(line, image, text, bad)
    if row < 0:
        raise ValueError(f"{op}: {path} has a header and no rows")


def filtered(
    op: str,
    path: Path,
    keep: Container[int],
    image_keys: Sequence[str],
    text_keys: Sequence[str],
    root: str,
) -> Iterator[str]:
    """The lines of a table with its header and some of its rows, in the same columns.

    Args:
        op, path, image_keys, text_keys: as in `iter_rows`.
        keep: numbers of the rows to keep.
        root: folder of relative image paths, which become absolute.
    """
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        header, separator = _header(file.readline(), image_keys, text_keys, None)
        at = next(header.index(key) for key in image_keys if key in header)
        line = io.StringIO()
        writer = csv.writer(line, delimiter=separator, lineterminator="\n")
        kept = (
            [*fields[:at], os.path.join(root, fields[at]), *fields[at + 1 :]]
            for row, (_, fields) in enumerate(_records(op, path, file, separator))
            if row in keep
        )
        for fields in itertools.chain([header], kept):
            writer.writerow(fields)
            yield line.getvalue()
            line.seek(0)
            line.truncate()


def _header(
    line: str, image_keys: Sequence[str], text_keys: Sequence[str], delimiter: str | None
) -> tuple[list[str], str]:
    """Column names and separator; of tab and comma, the one that finds more of the columns."""
    options = []
    for separator in [delimiter] if delimiter else ["\t", ","]:
        names = [name.strip() for name in next(csv.reader([line], delimiter=separator), [])]
        found = sum(any(key in names for key in keys) for keys in (image_keys, text_keys))
        options.append((found, len(names), names, separator))
    _, _, names, separator = max(options, key=lambda option: option[:2])
    return names, separator


def _records(op: str, path: Path, file: TextIO, separator: str) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of each record after the header; blank lines are no records."""
    at_end = False

    def lines() -> Iterator[str]:
        nonlocal at_end
        yield from file
        at_end = True

    reader = csv.reader(lines(), delimiter=separator)
    while True:
        line = reader.line_num + 2  # 1 for the header, 1 because the record starts on the next
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{op}: {path}, line {line}: {error}") from error
        if fields is None:
            return
        if at_end:  # the reader asked for more lines in the middle of a record
            raise ValueError(f"{op}: {path}, line {line}: a quoted field is never closed")
        if fields:
            yield line, fields


def _is_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _either(keys: Sequence[str]) -> str:
    return " or ".join(repr(key) for key in keys)
