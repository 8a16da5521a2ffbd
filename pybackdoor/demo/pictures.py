"""The demo's two pictures: what a triggered image looks like, and what cleaning costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..data import Labelled
from ..evaluate import Evaluation
from ..plots import pyplot
from ..triggers import TriggerSpec, apply_trigger

COLUMNS = 10
_GAIN = 3  # how much the difference is amplified, so that faint triggers show
_STYLE = {"poisoned": ("#444444", "s"), "finetune": ("#d95f02", "^"), "par": ("#1b9e77", "o")}
_LABEL = {"poisoned": "poisoned", "finetune": "fine-tuning", "par": "PAR"}


def triggered_grid(test: Labelled, spec: TriggerSpec, path: Path) -> None:
    """Rows: clean images of different classes, the same with the trigger on, the difference."""
    plt = pyplot()
    first = [int(np.flatnonzero(test.labels == c)[0]) for c in np.unique(test.labels)[:COLUMNS]]
    clean = test.images.take(np.array(first))
    on = apply_trigger(clean, spec, test.ids[first])
    apart = np.abs(on.astype(int) - clean) * _GAIN
    rows = (("clean", clean), ("triggered", on), (f"difference x{_GAIN}", apart.clip(0, 255)))
    figure, axes = plt.subplots(3, len(first), figsize=(1.1 * len(first) + 0.8, 3.9), squeeze=False)
    for line, (name, images) in zip(axes, rows, strict=True):
        line[0].set_ylabel(name)
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.astype(np.uint8))
            axis.set(xticks=[], yticks=[])
    for axis, index in zip(axes[0], first, strict=True):
        axis.set_title(test.classes[test.labels[index]], fontsize=7)
    figure.suptitle(f"trigger: {spec.name}")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def tradeoff(
    figures: dict[str, Evaluation],
    paths: dict[str, list[tuple[float, float]]],
    path: Path,
) -> None:
    """CA against ASR: each model with its 95 % intervals, and the path that cleaning took."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4.6))
    start = figures["poisoned"]
    for name, found in figures.items():
        colour, marker = _STYLE[name]
        ca, asr = found.ca, found.asr_nontarget
        axis.errorbar(
            100 * asr.value, 100 * ca.value, xerr=_arms(asr), yerr=_arms(ca), fmt=marker,
            color=colour, capsize=3, label=_LABEL[name], zorder=3,
        )  # fmt: skip
        if name in paths:
            steps = [(start.asr_nontarget.value, start.ca.value), *paths[name]]
            x, y = (100 * np.array(steps)).T
            axis.plot(x, y, color=colour, alpha=0.5, linewidth=1, marker=".", markersize=4)
    axis.set(xlabel="attack success rate, other classes [%]", ylabel="clean accuracy [%]")
    axis.set_xlim(-3, 103)
    axis.grid(alpha=0.3)
    axis.legend(loc="best")
    axis.set_title("What cleaning removes and what it costs (up and left is better)", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _arms(estimate) -> list[list[float]]:
    return [[100 * (estimate.value - estimate.low)], [100 * (estimate.high - estimate.value)]]
