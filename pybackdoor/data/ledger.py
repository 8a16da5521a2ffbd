"""What was left out of a data set, and why."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_atomically

_QUOTED = 5  # reasons quoted in the error; the ledger file has them all


@dataclass(frozen=True)
class BadRow:
    """One row left out: its number in the source, where it is, and the reason."""

    row: int
    location: str
    reason: str


@dataclass
class Ledger:
    """Rows left out of a source; more than max_bad of them is an error.

    Attributes:
        op: the function that reads, named in errors.
        total: rows of the source.
        max_bad: share of the rows that may be bad, in [0, 1].
        path: JSON-lines file, one `BadRow` a line; absent while nothing is bad.
        rows: those left out so far.
        skipped: members of shards that are no image and no caption, by extension.
    """

    op: str
    total: int
    max_bad: float = 0.0
    path: Path | None = None
    rows: list[BadRow] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"{self.op}: max_bad must be in [0, 1], got {self.max_bad!r}")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def allowed(self) -> int:
        """Bad rows that are accepted."""
        return math.floor(self.max_bad * self.total + 1e-9)  # 0.29 * 100 is 28.999999999999996

    def add(self, row: int, location: str, reason: str, *, write: bool = False) -> None:
        """Count a bad row.

        Args:
            write: add its line to the file at once; else ``save`` writes all of them.
        Raises:
            ValueError: it is one too many; the ledger file is written first.
        """
        bad = BadRow(row, location, reason)
        self.rows.append(bad)
        if write and self.path is not None:
            with suppress(OSError):  # read-only media: it counts all the same
                append_line(self.path, asdict(bad))
        if len(self.rows) <= self.allowed:
            return
        self.save()
        first = "; ".join(f"row {b.row} ({b.location}): {b.reason}" for b in self.rows[:_QUOTED])
        raise ValueError(
            f"{self.op}: at least {len(self.rows)} of {self.total} rows cannot be used, and "
            f"max_bad={self.max_bad:g} allows {self.allowed}. First: {first}. "
            f"Ledger: {self.path}"
        )

    def save(self) -> None:
        """Write the ledger file, or remove an outdated one when nothing is bad."""
        if self.path is None:
            return
        ordered = sorted(self.rows, key=lambda bad: bad.row)
        content = "".join(json.dumps(asdict(bad)) + "\n" for bad in ordered).encode("ascii")
        before = self.path.read_bytes() if self.path.exists() else b""
        if content == before:  # a cache on read-only media stays usable
            return
        if content:
            write_atomically(self.path, content)
        else:
            self.path.unlink()


def append_line(path: Path, content: Any) -> None:
    """Add a line of JSON to a file in one write, so that lines of several processes stay whole."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(fd, json.dumps(content).encode() + b"\n")
    finally:
        os.close(fd)
