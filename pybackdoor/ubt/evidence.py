"""What UBT-style unlearning found, for people: a table and a picture of the suspicious pairs."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_atomically
from ..plots import pyplot
from .gate import Gate
from .localise import Localisation
from .region import Region
from .suspects import Suspects

_SHOWN, _COLUMNS = 24, 6
_LINE, _LINES = 26, 4  # characters of a line under an image, and how many lines
_MARK, _PLAIN = "#c00000", "#404040"


def save_table(
    path: Path,
    suspects: Suspects,
    chosen: np.ndarray,  # [k] rows, the most suspicious first
    scores: np.ndarray,  # [N]
    found: Localisation | None,
) -> None:
    """suspects.csv: rank, row in the source, id, location, score, kept words, caption."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["rank", "row", "id", "location", "score", "kept_words", "caption"])
    for rank, row in enumerate(chosen):
        kept = "" if found is None else " ".join(w for w, keep in marked(found, rank) if keep)
        where = "" if suspects.locations is None else suspects.locations[int(row)]
        table.writerow(
            [rank + 1, int(suspects.rows[row]), int(suspects.ids[row]), where,
             f"{scores[row]:.6f}", kept, suspects.text(row) or ""]
        )  # fmt: skip
    write_atomically(path, text.getvalue().encode("utf-8", "surrogateescape"))


def save_picture(
    path: Path,
    suspects: Suspects,
    chosen: np.ndarray,  # [k] rows, the most suspicious first
    scores: np.ndarray,  # [N]
    found: Localisation | None,
    gate: Gate,
    region: Region | None = None,
) -> None:
    """The top suspects with their captions; what is to be forgotten in red: words, and cells."""
    from matplotlib.offsetbox import AnnotationBbox, HPacker, TextArea, VPacker
    from matplotlib.patches import Rectangle

    plt = pyplot()
    rows = chosen[:_SHOWN]
    images = suspects.pixels(rows).numpy()
    height = -(-len(rows) // _COLUMNS)
    figure, axes = plt.subplots(
        height, _COLUMNS, figsize=(2.1 * _COLUMNS, 2.9 * height + 0.6), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for rank, (axis, row) in enumerate(zip(axes.flat, rows, strict=False)):
        axis.imshow(images[rank])
        if region is not None:
            for corner in corners(region, rank):
                axis.add_patch(Rectangle(corner, *region.patch[::-1], fill=False, lw=1.5, ec=_MARK))
        axis.set_title(f"{rank + 1}: {scores[row]:.3f}", fontsize=8)
        words = marked(found, rank) if found else [(suspects.text(row) or "", False)]
        lines = [
            HPacker(
                children=[
                    TextArea(
                        word.replace("$", r"\$"),
                        textprops={
                            "color": _MARK if keep else _PLAIN, "fontsize": 7,
                            "weight": "bold" if keep else "normal",
                        },
                    )
                    for word, keep in line
                ],
                pad=0, sep=3,
            )
            for line in wrapped(words)
        ]  # fmt: skip
        if lines:
            box = VPacker(children=lines, pad=0, sep=1, align="center")
            axis.add_artist(
                AnnotationBbox(
                    box, (0.5, -0.03), xycoords="axes fraction", box_alignment=(0.5, 1),
                    frameon=False,
                )
            )  # fmt: skip
    figure.suptitle(f"most suspicious pairs; {gate.describe()}", fontsize=9, wrap=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # of scripts the font lacks
        figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def marked(found: Localisation, rank: int) -> list[tuple[str, bool]]:
    """(word, kept) of one suspicious caption, in order."""
    kept = found.kept[rank]
    return [(w.text, bool(k)) for w, k in zip(found.words[rank], kept, strict=True)]


def corners(region: Region, rank: int) -> list[tuple[float, float]]:
    """(x, y) of the kept cells of one suspicious image, where the picture draws them."""
    height, width = region.patch
    return [(x * width - 0.5, y * height - 0.5) for y, x in np.argwhere(region.kept[rank])]


def wrapped(words: Sequence[tuple[str, bool]]) -> list[list[tuple[str, bool]]]:
    """Lines of words that fit under an image; what does not is cut off with an ellipsis."""
    lines: list[list[tuple[str, Any]]] = [[]]
    used = 0
    for text, keep in words:
        text = text if len(text) <= _LINE else text[: _LINE - 1] + "…"
        if lines[-1] and used + len(text) > _LINE:
            if len(lines) == _LINES:
                lines[-1].append(("…", False))
                break
            lines.append([])
            used = 0
        lines[-1].append((text, keep))
        used += len(text) + 1
    return [line for line in lines if line]
