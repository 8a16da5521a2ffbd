"""CA against ASR, a panel for each attack: defences as points, PAR's thresholds as a line."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from _quality_defences import DEFENCES, NONE

from pybackdoor import par_clean
from pybackdoor.files import write_atomically
from pybackdoor.plots import pyplot

COLUMNS = 3
_COLOURS = 48  # of the picture's palette: an eighth of the bytes
_MARKERS = "so^vDP*Xd<>h"


def taus() -> dict[str, float]:
    """The defences that are PAR on held-out pairs, by rising tau."""
    found = {
        name: d.options["tau"]
        for name, d in DEFENCES.items()
        if d.method is par_clean and d.pairs == "held_out" and set(d.options) == {"tau"}
    }
    return dict(sorted(found.items(), key=lambda item: item[1]))


def draw(groups: dict[tuple[str, str], list[dict]], path: Path) -> bool:
    """Writes the picture of one data set and architecture; False when no attack has a figure."""
    points: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for (attack, defence), rows in groups.items():
        for row in rows:
            if "rebound" in row:  # of seeds whose attack installed
                seen = points.setdefault(attack, {}).setdefault(defence, [])
                seen.append((100 * row["asr_nontarget"]["value"], 100 * row["ca"]["value"]))
    if not points:
        return False
    plt = pyplot()
    lines = math.ceil(len(points) / COLUMNS)
    figure, axes = plt.subplots(
        lines, COLUMNS, figsize=(9, 2.6 * lines + 0.7), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    curve = taus()
    names = [name for name in DEFENCES if any(name in found for found in points.values())]
    single = [name for name in names if name not in curve or name == "par"]
    style = {name: (f"C{i % 10}", _MARKERS[i % len(_MARKERS)]) for i, name in enumerate(single)}
    style[NONE] = ("#444444", "s")
    any_swept = False
    for axis, (attack, found) in zip(axes.flat, points.items(), strict=False):
        swept = np.array([np.mean(found[name], axis=0) for name in curve if name in found])
        any_swept |= len(swept) > 1
        if len(swept) > 1:
            axis.plot(*swept.T, color=style.get("par", ("C2",))[0], linewidth=1, marker=".")
        for name in single:
            for point in found.get(name, ()):
                axis.plot(
                    *point, linestyle="", color=style[name][0], marker=style[name][1], alpha=0.7
                )
        axis.set_title(attack, fontsize=9)
        axis.set_xlim(-4, 104)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(points) :]:
        axis.set_axis_off()
    handles = [
        plt.Line2D([], [], linestyle="", color=style[name][0], marker=style[name][1], label=name)
        for name in single
    ]
    if any_swept:
        line = plt.Line2D([], [], color="C2", marker=".", linewidth=1, label="par over tau")
        handles.append(line)
    figure.legend(handles=handles, loc="outside upper center", ncols=5, fontsize=8)
    figure.supxlabel("ASR, other classes [%]", fontsize=9)
    figure.supylabel("CA [%]", fontsize=9)
    _save(figure, path)
    plt.close(figure)
    return True


def _save(figure, path: Path) -> None:
    from PIL import Image

    raw = io.BytesIO()
    figure.savefig(raw, dpi=75)
    with Image.open(raw) as image:
        small = image.convert("RGB").quantize(_COLOURS)
    out = io.BytesIO()
    small.save(out, "PNG", optimize=True)
    write_atomically(path, out.getvalue())
