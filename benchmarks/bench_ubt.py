"""UBT-style unlearning on models with a planted backdoor: detection, gate, words, cleaning.

    python benchmarks/bench_ubt.py --work DIR --json ubt.json --attacks badnet blended
    python benchmarks/bench_ubt.py --work DIR --json gate.json --attacks clean checkerboard \\
        --gate-only --seeds 20 --steps 1500
    python benchmarks/bench_ubt.py --work DIR --json image.json --attacks badnet --arch vit \\
        --image-share 0.25

A cell is an attack ("clean": none) and a seed: the quality matrix's small ResNet or ViT is trained
from scratch on its 35,000 CIFAR-10 pairs of the pack in $PYBACKDOOR_DATA, 1 % of them poisoned
unless --rate says otherwise.
Each ranking of the pairs (stage C's own, "dao" of pybackdoor.detect_samples, and "truth", an
oracle: what the later stages give once detection is solved) gets precision@k = recall@k, k being
the number of planted pairs, and the gate's figures. With each, ubt_clean then runs without any
clean pairs: with the first once more where k is found; under "truth" also with random words of the
same share, and, given --image-share, with the words forgotten on the suspicious patches alone:
trigger_kept is the share of the trigger's pixels that lie in these. PAR on the matrix's 10,000
clean pairs stands beside it, for time and pairs. A clean model's cell has the gate alone. Models
are kept in --work, cells in --json as they come; what is there, by the same settings, is not
computed again.

Settings were chosen on the attacks marked tuning. An attack whose ASR is not above 90 % says so
(status) and is not cleaned.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import _quality_defences
from _common import machine
from _quality_cells import (
    INSTALLED,
    PAIRS,
    Case,
    Clock,
    Work,
    case_of,
    cleaned,
    loader,
    measured,
    start_process,
    train_model,
    trained,
)
from _quality_models import ARCHITECTURES
from _quality_setting import (
    ATTACKS,
    BADCLIP,
    CLEAN,
    FULL,
    TINY,
    TRAIN,
    TUNING,
    Cell,
    Model,
    Setting,
    short_hash,
)
from torch import nn

import pybackdoor
from pybackdoor.files import write_json
from pybackdoor.methods.ubt import UbtResult
from pybackdoor.ubt import WordReader, localise
from pybackdoor.ubt.localise import Mentions, portions
from pybackdoor.ubt.region import cover

RATE, STEPS = 0.01, 4000
RANKINGS = ("fragility", "gain", "dao", "truth")
OWN = ("fragility", "gain")  # of ubt_clean itself
UBT = {**_quality_defences.UBT, "precision": "bf16", "progress": False}
OVERFIT = {"overfit_steps": 120, "overfit_lr": 1e-4}  # of the ranking by gain


def setting_of(tiny: bool, steps: int, rate: float = RATE) -> tuple[str, Setting]:
    """The data set, and the matrix's setting with other steps of training and another rate."""
    if tiny:
        data = dataclasses.replace(TINY.data["fashion"], held_out=23_400)
        return "fashion", dataclasses.replace(TINY, data={"fashion": data})
    train = {"cifar10": {"steps": steps, **TRAIN}}
    return "cifar10", dataclasses.replace(FULL, rates={"cifar10": rate}, train=train)


def scores_of(ranking: str, model: nn.Module, pairs: Any, truth: np.ndarray, case: Case):
    """What replaces stage C's own rankings; None for these."""
    if ranking in OWN:
        return None
    if ranking == "truth":
        return truth + np.random.default_rng(case.model.seed).random(len(truth)) / 2
    found = pybackdoor.detect_samples(
        model, pairs, method=ranking, tokenizer=case.loaded.tokenizer, progress=False
    )
    return found.scores


def random_words(reader, suspects, chosen, **options):
    """Stage D with words drawn at random, as many in each caption, and in all, as it keeps."""
    found = localise(reader, suspects, chosen, **options)
    rng = np.random.default_rng(0)
    kept = [rng.permutation(own) for own in found.kept]
    rows, split = suspects.tokens(chosen), WordReader(suspects.tokenizer)
    held = {
        word.key
        for own, keep in zip(found.words, kept, strict=True)
        for word, kept_it in zip(own, keep, strict=True)
        if kept_it
    }
    drawn = rng.permutation(sorted(held))[: sum(token.enriched for token in found.tokens)]
    return dataclasses.replace(
        found, kept=kept, portions=portions(split, rows, found.words, kept),
        mentions=Mentions(split, set(drawn)),
    )  # fmt: skip


class Planted:
    """One model, the pairs it was trained on, and which of them are poisoned."""

    def __init__(self, model: Model, work: Work) -> None:
        if model.attack == BADCLIP:
            train_model(model.clean, work)  # its patch is found on that one
        self.record = train_model(model, work)
        self.work, self.case = work, case_of(model, work)
        self.model = trained(model, work)
        self.pairs = PAIRS["suspect"](self.case, work.setting)
        there = self.case.parts.planted
        step = np.split(np.arange(len(there)), range(1000, len(there), 1000))
        self.truth = np.concatenate(
            [(self.pairs.images.take(i) != there.images.take(i)).any((1, 2, 3)) for i in step]
        )
        self.k = max(5, round(work.setting.rate(model) * len(there)))

    def run(self, ranking: str, **more: Any) -> dict[str, Any]:
        """One run of ubt_clean and its figures."""
        clock = Clock()
        scores = scores_of(ranking, self.model, self.pairs, self.truth, self.case)
        own = {"k": self.k, **({"rank": ranking} if ranking in OWN else {})}
        own |= OVERFIT if ranking == "gain" else {}
        result = pybackdoor.ubt_clean(
            self.model, loader(self.pairs, self.case, TRAIN["batch_size"]), scores=scores,
            seed=self.case.model.seed, device=self.work.device, **{**UBT, **own, **more},
        )  # fmt: skip
        gate = result.report["gate"]
        found: dict[str, Any] = {"gate": {**gate, "classes": len(gate["classes"])}, **clock.read()}
        if self.truth.any():
            found["precision_at_k"] = float(self.truth[result.chosen].mean())
        if result.backdoor_found:
            report = result.report
            found |= {
                "after": measured(result.model, self.case, self.work).to_dict(),
                "stopped": report["stopped"], "steps": report["steps_done"], "way": report["way"],
                "pairs_seen": report["pairs_seen"], "chosen": len(result.chosen),
                "words": [w["text"] for w in report["words"] if w["enriched"]],
            }  # fmt: skip
            if result.region is not None:
                found |= {"region": report["region"], "trigger_kept": self._kept(result)}
        return found

    def _kept(self, result: UbtResult) -> float:
        """Of the pixels that the trigger changed in an image, the share in kept cells; a mean."""
        places, region = np.flatnonzero(self.truth[result.chosen]), result.region
        rows = result.chosen[places]
        clean = self.case.parts.planted.images.take(rows)
        put_on = (self.pairs.images.take(rows) != clean).any(-1)
        cells = torch.from_numpy(region.kept[places])
        kept = cover(torch.zeros(clean.shape, dtype=torch.uint8), cells, region.patch, (1, 1, 1))
        inside = put_on & (kept[..., 0] == 1).numpy()
        return float((inside.sum((1, 2)) / put_on.sum((1, 2))).mean())

    def par(self) -> dict[str, Any]:
        """PAR on clean pairs, with the matrix's settings."""
        cell = Cell(self.case.model, "par")
        student, told = cleaned(self.model, cell, self.case, self.work)
        return {**told, "after": measured(student, self.case, self.work).to_dict()}


def compute(job: tuple[Model, Work, tuple[str, ...], bool, float | None]) -> dict[str, Any]:
    """A cell of the JSON file."""
    model, work, rankings, gate_only, image_share = job
    start_process()
    made = Planted(model, work)
    names = ("attack", "arch", "seed", "rate", "half", "status", "ca", "asr_nontarget")
    cell = {name: made.record.get(name) for name in names}
    cell |= {"steps": work.setting.train[model.data]["steps"], "k": made.k, "runs": {}}
    cell["of"] = settings_hash(rankings, gate_only, image_share)
    some = {"steps": 1, "k": None} if gate_only else {}
    attacked = model.attack != CLEAN
    if attacked and made.record["status"] != INSTALLED:
        return cell
    for ranking in rankings:
        if attacked or ranking != "truth":
            cell["runs"][ranking] = made.run(ranking, **some)
    if attacked and not gate_only:
        if "fragility" in rankings:
            cell["runs"]["fragility, k found"] = made.run("fragility", k=None)
        with mock.patch("pybackdoor.methods.ubt.localise", random_words):
            cell["runs"]["truth, random words"] = made.run("truth")
        if image_share is not None:
            cell["runs"]["truth, image side"] = made.run("truth", image_share=image_share)
        cell["par"] = made.par()
    return cell


def settings_hash(rankings: Any, gate_only: bool, image_share: float | None) -> str:
    """Of what a cell depends on besides its model."""
    of = [list(rankings), gate_only, image_share]
    return short_hash({"ubt": UBT | OVERFIT, "version": _quality_defences.UBT_VERSION, "of": of})


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--json", type=Path, required=True, metavar="FILE")
    options.add_argument("--work", type=Path, required=True, metavar="DIR", help="of the models")
    options.add_argument("--attacks", nargs="+", default=[CLEAN, *TUNING], choices=ATTACKS)
    options.add_argument("--arch", default="resnet", choices=ARCHITECTURES)
    options.add_argument("--image-share", type=float, help="of the patches; with --arch vit")
    options.add_argument("--seeds", type=int, default=1, help="0 to this, of each attack")
    options.add_argument("--steps", type=int, default=STEPS, help=f"of training ({STEPS})")
    options.add_argument("--rate", type=float, default=RATE, help=f"of poisoned pairs ({RATE})")
    options.add_argument("--rankings", nargs="+", help=f"default: {' '.join(RANKINGS)}")
    options.add_argument(
        "--gate-only", action="store_true",
        help="by fragility, k found, as a user would; one step of unlearning at most",
    )  # fmt: skip
    options.add_argument("--jobs", type=int, default=1, help="processes, a thread each")
    options.add_argument("--device", default="cpu")
    options.add_argument("--tiny", action="store_true", help="a self-check that shows nothing")
    chosen = options.parse_args(arguments)
    if chosen.image_share is not None and chosen.arch != "vit":
        options.error(f"--image-share needs --arch vit, got {chosen.arch}")
    if not 0 < chosen.rate < 1:
        options.error(f"--rate must be a share between 0 and 1, got {chosen.rate:g}")
    if chosen.tiny and chosen.rate != RATE:
        options.error("--tiny has a rate of its own: leave --rate out")
    if chosen.rankings is None:
        chosen.rankings = ["fragility"] if chosen.gate_only else list(RANKINGS)
    data, setting = setting_of(chosen.tiny, chosen.steps, chosen.rate)
    work = Work(chosen.work, setting, chosen.device)
    cells = json.loads(chosen.json.read_text())["cells"] if chosen.json.exists() else []
    about = settings_hash(chosen.rankings, chosen.gate_only, chosen.image_share)
    if any(cell["of"] != about for cell in cells):
        options.error(f"{chosen.json} holds cells of other settings: name another file")
    done = {
        tuple(cell[name] for name in ("arch", "attack", "seed", "steps", "rate")) for cell in cells
    }
    steps, rate = setting.train[data]["steps"], setting.rates[data]
    jobs = [
        (
            Model(data, chosen.arch, attack, seed), work, tuple(chosen.rankings), chosen.gate_only,
            chosen.image_share,
        )
        for seed in range(chosen.seeds)
        for attack in chosen.attacks
        if (chosen.arch, attack, seed, steps, None if attack == CLEAN else rate) not in done
    ]  # fmt: skip
    with multiprocessing.get_context("spawn").Pool(chosen.jobs) as pool:
        for cell in pool.imap_unordered(compute, jobs):
            cells.append(cell)
            head = {"machine": machine(), "ubt": UBT | OVERFIT, "rankings": list(chosen.rankings)}
            head["image_share"] = chosen.image_share
            write_json(chosen.json, {**head, "cells": cells})
            print(told(cell), flush=True)


def told(cell: dict[str, Any]) -> str:
    """One cell in some lines."""
    name = f"{cell['attack']}, {cell['arch']}, seed {cell['seed']}"
    lines = [f"{name}: {cell['status']}, CA {percent(cell['ca'])}"]
    if cell["asr_nontarget"]:
        lines[0] += f", ASR {percent(cell['asr_nontarget'])}"
    for name, run in cell["runs"].items():
        words = [f"gate {run['gate']['statistic']:.3f} {'fires' if run['gate']['fires'] else '-'}"]
        if "precision_at_k" in run:
            words.append(f"P@k {run['precision_at_k']:.3f}")
        if "trigger_kept" in run:
            words.append(f"{100 * run['trigger_kept']:.0f} % of the trigger kept")
        lines.append(f"  {name}: {', '.join([*words, *after(run)])}")
    if "par" in cell:
        lines.append(f"  PAR: {', '.join(after(cell['par']))}")
    return "\n".join(lines)


def after(run: dict[str, Any]) -> list[str]:
    if "after" not in run:
        return []
    shown = {"ca": "CA", "asr_nontarget": "ASR"}
    words = [f"{text} {percent(run['after'][n])}" for n, text in shown.items() if n in run["after"]]
    return [*words, f"{run['pairs_seen']} pairs", f"{run['cpu_seconds']:.0f} s of a core"]


def percent(estimate: dict[str, float]) -> str:
    return f"{100 * estimate['value']:.1f}"


if __name__ == "__main__":
    main()
