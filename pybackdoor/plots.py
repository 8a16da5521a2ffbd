"""Pictures of a run, drawn without a display."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PANELS = (
    ("loss", ("loss", "contrastive")),
    ("mean squared distance to the input model", ("s_image", "s_text")),
    ("learning rate", ("lr",)),
    ("pairs a second, over the last steps", ("pairs_per_second",)),
)
_MOST = 2000  # points of a line


def pyplot() -> Any:
    """matplotlib's pyplot on the Agg backend, imported when something is drawn."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot

    return pyplot


def training_curves(history: Sequence[dict[str, float]], path: Path) -> None:
    """Loss, distances, learning rate and throughput over the steps, a panel each; of what was
    recorded: steps without a number are a gap.
    """
    plt = pyplot()
    names = {*history[0], *history[-1]} if history else set()
    panels = [(title, [n for n in lines if n in names]) for title, lines in _PANELS]
    panels = [(title, lines) for title, lines in panels if lines]
    if not panels:
        return
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(7, 2.3 * len(panels)), sharex=True, squeeze=False
    )
    shown = history[:: max(1, len(history) // _MOST)]
    steps = [record["step"] for record in shown]
    for axis, (title, lines) in zip(axes[:, 0], panels, strict=True):
        for name in lines:
            axis.plot(steps, [r.get(name, math.nan) for r in shown], linewidth=1, label=name)
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(fontsize=8)
    axes[-1, 0].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
