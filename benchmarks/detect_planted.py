"""Detection judged on planted poison: every method, on the quality matrix's models.

    python benchmarks/detect_planted.py --work DIR --json detect.json --attacks badnet blended

A cell is an attack and a seed: the model and the training pairs of bench_ubt.py, 1 % of them
poisoned. Each method scores the pairs, told nothing: AUROC, and precision among the k highest
scores, k being the number of planted pairs, so that it is the recall too; with what a run costs.
Methods of neighbours run once for each of --references (0: among all), "gain" with a model overfit
as ubt_clean does, "fragility" also says how many pairs it finds suspicious and by which word.
Models are kept in --work, cells in --json as they come; what is there is not computed again.

Attacks marked tuning are those that settings were chosen on: the reference of neighbours on
checkerboard, fragility on both. An attack whose ASR is not above 90 % says so and is not looked at.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _common import machine
from _quality_cells import INSTALLED, Clock, Work
from _quality_setting import ATTACKS, CLEAN, TRAIN, Model
from bench_ubt import OVERFIT, STEPS, Planted, percent, setting_of
from torch import nn

from pybackdoor import detect_samples
from pybackdoor.batches import InputRules
from pybackdoor.detect import METHODS, DetectionResult
from pybackdoor.detect.samples import REFERENCE
from pybackdoor.files import write_json
from pybackdoor.ubt import Suspects, overfit, weak_pool

HEAD = ("attack", "seed", "rate", "half", "status", "ca", "asr_nontarget")


def detected(made: Planted, **options: Any) -> DetectionResult:
    return detect_samples(
        made.model, made.pairs, tokenizer=made.case.loaded.tokenizer, truth=made.truth,
        progress=False, **options,
    )  # fmt: skip


def overfitted(made: Planted) -> nn.Module:
    """The model after some steps on the pairs whose cosines are lowest: UBT's first stages."""
    cosines = -detected(made, method="low_cosine").scores
    rules = InputRules.of(made.model, tokenizer=made.case.loaded.tokenizer)
    return overfit(
        made.model, Suspects.of(made.pairs, rules, False), weak_pool(cosines),
        rules=rules, device=next(made.model.parameters()).device, steps=OVERFIT["overfit_steps"],
        lr=OVERFIT["overfit_lr"], batch_size=TRAIN["batch_size"], seed=made.case.model.seed,
        progress=False,
    )  # fmt: skip


def run(made: Planted, method: str, reference: int | None, k: int | None) -> dict[str, Any]:
    """One method's figures; the time is that of all it needs, the overfit included."""
    clock = Clock()
    given = {"overfit": overfitted(made)} if method == "gain" else {}
    found = detected(made, method=method, reference=reference, k=k, **given)
    measures = found.measures()
    at = measures["at"][0]
    row = {"method": method, "reference": reference, "auroc": measures["auroc"], **at}
    own = {name: found.settings[name] for name in ("found", "word") if name in found.settings}
    return {**row, **own, **clock.read()}


def compute(model: Model, work: Work, options: argparse.Namespace) -> dict[str, Any]:
    """A cell of the JSON file."""
    made = Planted(model, work)
    cell: dict[str, Any] = {name: made.record[name] for name in HEAD}
    cell |= {"steps": work.setting.train[model.data]["steps"], "pairs": len(made.pairs), "runs": []}
    if made.record["status"] != INSTALLED:
        return cell
    for method in options.methods:
        takes = METHODS[method].takes
        sought = int(made.truth.sum()) // 2 if options.tiny and takes == "views" else None
        for reference in options.references if takes == "neighbours" else [None]:
            cell["runs"].append(run(made, method, reference, sought))
    return cell


def told(cell: dict[str, Any]) -> str:
    """One cell in some lines."""
    about = f"CA {percent(cell['ca'])}, ASR {percent(cell['asr_nontarget'])}"
    lines = [f"{cell['attack']} seed {cell['seed']} ({cell['half']}): {cell['status']}, {about}"]
    for row in cell["runs"]:
        words = [f"AUROC {row['auroc']:.3f}", f"P@{row['k']} {row['precision']:.3f}"]
        if "found" in row:
            words.append(f"{row['found']} of {row['word']!r} found")
        among = "" if row["reference"] is None else f" among {row['reference'] or 'all'}"
        lines.append(f"  {row['method']}{among}: {', '.join(words)}, {row['cpu_seconds']:.0f} s")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--json", type=Path, required=True, metavar="FILE")
    options.add_argument("--work", type=Path, required=True, metavar="DIR", help="of the models")
    attacks = [attack for attack in ATTACKS if attack != CLEAN]
    options.add_argument("--attacks", nargs="+", default=attacks, choices=attacks)
    options.add_argument("--seeds", type=int, default=1, help="0 to this, of each attack")
    options.add_argument("--steps", type=int, default=STEPS, help=f"of training ({STEPS})")
    options.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options.add_argument("--references", nargs="+", type=int, default=[REFERENCE, 0])
    options.add_argument("--device", default="cpu")
    options.add_argument("--tiny", action="store_true", help="a self-check that shows nothing")
    chosen = options.parse_args(arguments)
    data, setting = setting_of(chosen.tiny, chosen.steps)
    work = Work(chosen.work, setting, chosen.device)
    cells = json.loads(chosen.json.read_text())["cells"] if chosen.json.exists() else []
    done = {(cell["attack"], cell["seed"], cell["steps"]) for cell in cells}
    steps = setting.train[data]["steps"]
    for seed in range(chosen.seeds):
        for attack in chosen.attacks:
            if (attack, seed, steps) not in done:
                cells.append(compute(Model(data, "resnet", attack, seed), work, chosen))
                write_json(chosen.json, {"machine": machine(), "overfit": OVERFIT, "cells": cells})
                print(told(cells[-1]), flush=True)


if __name__ == "__main__":
    main()
