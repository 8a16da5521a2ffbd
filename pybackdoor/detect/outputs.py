"""Files of a detection: scores, what to keep, and the most suspicious pairs to look at."""

from __future__ import annotations

import csv
import io
import os
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..data import Pairs
from ..data.store import attempt
from ..data.tables import CAPTION_KEYS, IMAGE_KEYS, filtered
from ..files import atomic_file
from ..plots import pyplot
from .samples import DetectionResult

SHOWN = 64  # pairs of the picture
_COLUMNS, _LINE, _LINES = 8, 24, 3  # pictures in a row; letters and lines of a caption


def write_scores(path: Path, result: DetectionResult, pairs: Pairs) -> None:
    """A csv of all pairs, most suspicious first, those without a score last.

    Columns: rank (from 1), score, id, location, caption; rank and score of the last are empty.
    """
    lines = _csv(
        [str(rank), repr(float(result.scores[row])), *_about(result, pairs, row)]
        for rank, row in enumerate(result.order.tolist(), 1)
    )
    without = _csv(["", "", *_about(result, pairs, row)] for row in sorted(result.broken))
    _write(path, ["rank,score,id,location,caption\n"], lines, without)


def write_kept_table(
    path: Path,
    source: Path,
    ids: np.ndarray,  # [n] int64, rows of the source
    *,
    image_key: str | None = None,
    caption_key: str | None = None,
    root: str | os.PathLike | None = None,
) -> None:
    """The source's csv or tsv with some of its rows, all its columns, and absolute image paths.

    Args:
        image_key, caption_key, root: as for ``pairs_from_csv``.
    """
    keys = [
        known if key is None else (key,)
        for key, known in ((image_key, IMAGE_KEYS), (caption_key, CAPTION_KEYS))
    ]
    folder = os.path.abspath(source.parent if root is None else root)
    _write(path, filtered("detect", source, set(ids.tolist()), *keys, folder))


def write_kept_pairs(path: Path, pairs: Pairs, rows: np.ndarray) -> None:
    """A csv ``image,caption`` of some pairs whose locations are image files."""
    kept = ([pairs.locations[row], pairs.captions[row]] for row in rows.tolist())
    _write(path, ["image,caption\n"], _csv(kept))


def write_kept_keys(path: Path, pairs: Pairs, rows: np.ndarray) -> None:
    """One line ``shard#key`` for each of some pairs out of shards (``file#row`` for parquet)."""
    lines = (f"{sample_key(pairs.locations[row])}\n" for row in rows.tolist())
    _write(path, lines)


def sample_key(location: str) -> str:
    """A location ``shard#member`` without the member's extension."""
    shard, mark, member = location.rpartition("#")
    folder, slash, name = member.rpartition("/")
    return f"{shard}{mark}{folder}{slash}{name.partition('.')[0]}"


def suspects_picture(path: Path, result: DetectionResult, pairs: Pairs) -> None:
    """The most suspicious pairs: images with score and caption, worst first; planted ones red."""
    plt = pyplot()
    rows = result.top(min(SHOWN, len(result.order)))
    images, _ = attempt(pairs.images, rows)
    down = -(-len(rows) // _COLUMNS)
    figure, axes = plt.subplots(
        down, _COLUMNS, figsize=(1.7 * _COLUMNS, 2.1 * down + 0.5), squeeze=False
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, row, image in zip(axes.flat, rows.tolist(), images, strict=False):
        axis.imshow(image)
        known = result.truth is not None and result.truth[row]
        caption = textwrap.wrap(pairs.captions[row], _LINE)[:_LINES]
        text = "\n".join([f"{result.scores[row]:.3g}", *caption]).replace("$", r"\$")
        axis.set_title(text, fontsize=6, color="#c00000" if known else "black")
    figure.suptitle(f"most suspicious pairs by {result.method}, worst first", fontsize=10)
    with warnings.catch_warnings():  # captions in scripts that the font lacks show boxes
        warnings.filterwarnings("ignore", message="Glyph")
        figure.tight_layout()
        figure.savefig(path, dpi=110)
    plt.close(figure)


def _about(result: DetectionResult, pairs: Pairs, row: int) -> list[str]:
    return [str(result.ids[row]), pairs.locations[row], pairs.captions[row]]


def _csv(rows: Iterable[Sequence[str]]) -> Iterable[str]:
    for row in rows:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(row)
        yield line.getvalue()


def _write(path: Path, *parts: Iterable[str]) -> None:
    with atomic_file(path) as file:
        for part in parts:
            for line in part:
                file.write(line.encode("utf-8", "surrogateescape"))
