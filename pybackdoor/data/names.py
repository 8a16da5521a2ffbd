"""Patterns of file names: globs, braces, folders and URLs."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .remote import filesystem, is_remote

_MOST_FILES = 1_000_000


def file_names(op: str, source: str | Path | Sequence[str | Path], suffix: str) -> list[str]:
    """The files that a path, folder, pattern, URL or several of them name, absolute, in order.

    Raises:
        ValueError: none, or one with another suffix.
    """
    several = [source] if isinstance(source, str | Path) else list(source)
    names = [name for one in several for name in _expanded(op, os.fspath(one), suffix)]
    for name in names:
        if not name.lower().endswith(suffix):
            raise ValueError(
                f"{op}: source must name uncompressed {suffix} files, got {name!r} (a compressed "
                "one cannot be read by place: unpack it first)"
            )
    if not names:
        raise ValueError(f"{op}: source must name at least one file, got {source!r}")
    return names


def _expanded(op: str, pattern: str, suffix: str) -> Iterator[str]:
    if pattern.startswith("pipe:"):
        raise ValueError(f"{op}: pipe: runs a command and is not supported, got {pattern!r}")
    remote = is_remote(pattern)
    if not remote and os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), f"*{suffix}")
    elif not remote and os.path.exists(pattern):  # whatever characters are in its name
        yield os.path.abspath(pattern)
        return
    for name in itertools.islice(braces(pattern), _MOST_FILES):
        if not re.search(r"[*?\[]", name):
            yield name if remote else os.path.abspath(name)
            continue
        if remote:
            system, path = filesystem(name)
            found = [system.unstrip_protocol(one) for one in sorted(system.glob(path))]
        else:
            found = [os.path.abspath(one) for one in sorted(glob.glob(name))]
        if not found:
            raise ValueError(f"{op}: no file matches {name!r}")
        yield from found


def braces(pattern: str) -> Iterator[str]:
    """A pattern's names: {00000..00010} counts, keeping leading zeros; {a,b} lists."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        yield pattern
        return
    first, last, listed = match.groups()
    if listed is not None:
        middles: Any = listed.split(",")
    else:
        width = len(first) if first[0] == "0" or len(first) == len(last) else 0
        middles = (f"{i:0{width}}" for i in range(int(first), int(last) + 1))
    for middle in middles:
        yield from braces(pattern[: match.start()] + middle + pattern[match.end() :])
