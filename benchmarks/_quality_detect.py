"""What detect_planted.py measured, as a table for the page of the quality matrix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from _quality_cells import INSTALLED
from _tables import table

FILE = "detect_planted.json"  # below benchmarks/results
TEXT = """## Sample detectors

`python benchmarks/detect_planted.py`: the small ResNet trained on {pairs:,} CIFAR-10 pairs,
{rate:g} % of them poisoned, and every method of `detect_samples` on these pairs, told nothing.
AUROC: how well the scores rank poisoned pairs above the others (0.5: chance); P@k: precision =
recall among the k highest scores, k being the number of poisoned pairs. among: how many others each
image is compared with. found: how many pairs fragility takes for poisoned, and by which word.
Seconds are of one core, and those of `gain` hold the overfit. (t): settings were chosen on this
attack."""


def sections(folder: Path) -> list[str]:
    """The part of the page that the file in ``folder`` gives, if it is there."""
    path = folder / FILE
    if not path.exists():
        return []
    cells = json.loads(path.read_text())["cells"]
    installed = [cell for cell in cells if cell["status"] == INSTALLED]
    about = {"pairs": cells[0]["pairs"], "rate": 100 * cells[0]["rate"]}
    header = ["attack", "seed", "steps", "CA", "ASR", "method", "among", "AUROC", "P@k", "found"]
    rows = [row for cell in installed for row in _rows(cell)]
    return [TEXT.format(**about), table([*header, "seconds"], rows)]


def _rows(cell: dict[str, Any]) -> list[list[str]]:
    name = cell["attack"] + " (t)" * (cell["half"] == "tuning")
    about = [name, str(cell["seed"]), f"{cell['steps']:,}"]
    about += [f"{100 * cell[figure]['value']:.1f}" for figure in ("ca", "asr_nontarget")]
    return [
        [
            *about, run["method"], _among(run["reference"]), f"{run['auroc']:.3f}",
            f"{run['precision']:.3f}",
            f"{run['found']} of {run['word']}" if "found" in run else "-",
            f"{run['cpu_seconds']:.0f}",
        ]
        for run in cell["runs"]
    ]  # fmt: skip


def _among(reference: int | None) -> str:
    return "-" if reference is None else f"{reference:,}" if reference else "all"
