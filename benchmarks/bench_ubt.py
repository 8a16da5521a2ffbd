"""UBT-style unlearning on models with a planted backdoor: detection, gate, words, cleaning.

    python benchmarks/bench_ubt.py --out ubt.json --attacks badnet blended badnet_stripes
    python benchmarks/bench_ubt.py --out gate.json --gate-only --attacks clean badnet --seeds 20

A cell is an attack ("clean": none) and a seed: the demo's kind of small ResNet is trained from
scratch on 35,000 CIFAR-10 pairs of the pack in $PYBACKDOOR_DATA, 1 % of them poisoned. Each ranking
of the pairs ("gain" is stage C's own; "dao" where pybackdoor.detect_samples is there; "truth" is an
oracle, what the later stages give once detection is solved) gets precision@k = recall@k, k being
the number of planted pairs, and the gate's figures. With each, ubt_clean then runs without any
clean pairs; under "truth" also with random words of the same share. The clean model's cell has the
gate alone. Cells are appended to --out as they come; those that are there are not run again.

Settings were chosen on the attacks in TUNING. The figures of an attack whose ASR is not above 90 %
say so (installed: false).
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

import pybackdoor
from pybackdoor.batches import InputRules
from pybackdoor.clean import trainable_copy
from pybackdoor.data import PairLoader, labelled_from_arrays, pairs_from_labelled
from pybackdoor.engine import Settings, train
from pybackdoor.files import write_json
from pybackdoor.methods.finetune import Contrastive
from pybackdoor.models import create
from pybackdoor.poison import warmup_cosine
from pybackdoor.ubt import localise
from pybackdoor.ubt.localise import portions
from pybackdoor.ubt.words import WordReader

OWN = ("gain", "fragility")
TUNING = ("checkerboard", "sig")
TARGET, RATE, HELD_OUT = "truck", 0.01, 15_000
TEMPLATES = (
    "a photo of a {}.", "a picture of one {}.", "a small photo of the {}.",
    "an image showing a {}.", "there is a {} in the photo.",
)  # fmt: skip
BATCH, LR, WARMUP, DECAY = 128, 2e-3, 30, 0.05  # of the training from scratch
# Models of a million weights from scratch want rates some hundred times those for a trained CLIP.
UBT = {
    "overfit_steps": 60, "overfit_lr": 1e-4, "tail": "low", "steps": 300, "lr_start": 1e-4,
    "lr": 1e-4, "beta": 2.0, "check_every": 10, "precision": "fp32", "device": "cpu",
    "progress": False, "augment": False,
}  # fmt: skip
# 1,200 steps installed stripes at an ASR of 46 % and blended at 83 %: too little to be judged.
SIZES = {False: (35_000, 2_000, 2_000), True: (300, 60, 3)}  # tiny: pairs, tests, training steps


def read(tiny: bool) -> tuple[Any, Any]:
    """(training, test) pictures of the pack; the same ones for every cell."""
    count, tests, _ = SIZES[tiny]
    path = Path(os.environ.get("PYBACKDOOR_DATA", "")) / "cifar10_32.npz"
    if not path.is_file():
        raise FileNotFoundError(f"PYBACKDOOR_DATA must name the folder with {path.name}")
    with np.load(path, allow_pickle=False) as pack:
        raw, ends, split = pack["data"].tobytes(), pack["offs"], pack["split"]
        label, names = pack["label"].astype(np.int64), [str(name) for name in pack["classes"]]
    sets = []
    for part, skipped, wanted in ((0, HELD_OUT, count), (1, 0, tests)):
        order = np.random.default_rng(part).permutation(np.flatnonzero(split == part))
        rows = np.sort(order[skipped : skipped + wanted])
        files = (io.BytesIO(raw[ends[i] : ends[i + 1]]) for i in rows)
        pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
        sets.append((pixels, label[rows]))
    return tuple(labelled_from_arrays(*each, names) for each in sets)


def trained(attack: str, seed: int, tiny: bool) -> dict[str, Any]:
    """A fresh model trained on (poisoned) pairs, and what is known of it."""
    pictures, test = read(tiny)
    pixels = pictures.images.take(np.arange(0, len(pictures), 17)) / 255
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = create(
            {
                "model_cfg": {
                    "embed_dim": 64,
                    "vision_cfg": {
                        "image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32
                    },
                    "text_cfg": {
                        "context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2,
                        "layers": 2,
                    },
                },
                "preprocess_cfg": {
                    "size": 32, "mean": pixels.mean((0, 1, 2)).tolist(),
                    "std": pixels.std((0, 1, 2)).tolist(),
                },
            }
        )  # fmt: skip
    pairs, truth, spec = pairs_from_labelled(pictures, TEMPLATES, seed), None, None
    if attack != "clean":
        spec = pybackdoor.trigger(attack, seed=seed)
        pairs, manifest = pybackdoor.poison_pairs(
            pairs, spec, target=TARGET, templates=TEMPLATES, rate=RATE, seed=seed
        )
        truth = np.isin(pairs.ids, [sample.id for sample in manifest.samples])
    model = trainable_copy(fresh.model, torch.device("cpu"))
    settings = Settings(
        steps=SIZES[tiny][2], weight_decay=DECAY, precision="fp32", seed=seed, freeze_scale=False,
        freeze_batchnorm=False, progress=False,
    )  # fmt: skip
    train(
        model, PairLoader(pairs, fresh.tokenizer, batch_size=BATCH, seed=seed), Contrastive(),
        warmup_cosine(LR, WARMUP), settings, rules=InputRules.of(model),
        device=torch.device("cpu"),
    )  # fmt: skip
    return {
        "model": model.eval(), "tokenizer": fresh.tokenizer, "pairs": pairs, "truth": truth,
        "spec": spec, "test": test,
    }  # fmt: skip


def figures(made: dict[str, Any], model: torch.nn.Module) -> dict[str, float]:
    """CA, and with an attack ASR (other classes) and accuracy under the trigger."""
    attack = {} if made["spec"] is None else {"trigger": made["spec"], "target": TARGET}
    found = pybackdoor.evaluate(
        model, made["test"], tokenizer=made["tokenizer"], templates=TEMPLATES, **attack
    )
    names = ("ca", "asr_nontarget", "triggered_accuracy")
    return {n: getattr(found, n).value for n in names if getattr(found, n) is not None}


def scores_of(ranking: str, made: dict[str, Any], seed: int) -> np.ndarray | None:
    """What replaces stage C's own rankings; None for these."""
    if ranking in OWN:
        return None
    if ranking == "truth":
        return made["truth"] + np.random.default_rng(seed).random(len(made["truth"])) / 2
    found = pybackdoor.detect_samples(made["model"], made["pairs"], method=ranking, progress=False)
    return found.scores


def random_words(reader, suspects, chosen, **options):
    """Stage D with words drawn at random, as many in each caption as it keeps."""
    found = localise(reader, suspects, chosen, **options)
    rng = np.random.default_rng(0)
    kept = [rng.permutation(own) for own in found.kept]
    rows = suspects.tokens(chosen)
    blind = portions(WordReader(suspects.tokenizer), rows, found.words, kept)
    return dataclasses.replace(found, kept=kept, portions=blind)


def cleaned(made: dict[str, Any], scores: np.ndarray | None, k: int, seed: int, **more) -> dict:
    """One run of ubt_clean and its figures."""
    began = time.perf_counter()
    loader = PairLoader(made["pairs"], made["tokenizer"], batch_size=BATCH, seed=seed)
    result = pybackdoor.ubt_clean(
        made["model"], loader, k=k, scores=scores, seed=seed, **{**UBT, **more}
    )
    cell: dict[str, Any] = {"gate": result.report["gate"], "seconds": time.perf_counter() - began}
    if made["truth"] is not None:
        cell["precision_at_k"] = float(made["truth"][result.chosen].mean())
    if result.backdoor_found:
        report = result.report
        cell |= {
            "after": figures(made, result.model), "steps": report["steps_done"],
            "stopped": report["stopped"], "kappa": report["kappa"], "checks": report["checks"],
            "words": [w["text"] for w in report["words"] if w["enriched"]],
        }  # fmt: skip
    return cell


def run_cell(job: tuple[str, int, tuple[str, ...], bool, bool]) -> dict[str, Any]:
    """One model, from its training on; a cell of the JSON file."""
    attack, seed, rankings, gate_only, tiny = job
    torch.set_num_threads(1)
    made = trained(attack, seed, tiny)
    k = max(5, round(RATE * len(made["pairs"])))
    before = figures(made, made["model"])
    cell: dict[str, Any] = {"attack": attack, "seed": seed, "k": k, "before": before, "runs": {}}
    if attack != "clean":
        cell["installed"] = before["asr_nontarget"] > 0.9
    more: dict[str, Any] = {"steps": 1} if gate_only else {}
    for ranking in rankings:
        if attack == "clean" and ranking == "truth":
            continue
        scores = scores_of(ranking, made, seed)
        own = {"rank": ranking} if ranking in OWN else {}
        cell["runs"][ranking] = cleaned(made, scores, k, seed, **own, **more)
        if ranking == "truth" and not gate_only:
            with mock.patch("pybackdoor.methods.ubt.localise", random_words):
                cell["runs"]["truth, random words"] = cleaned(made, scores, k, seed)
    return cell


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=Path, required=True, metavar="JSON")
    options.add_argument("--attacks", nargs="+", default=["clean", *TUNING])
    options.add_argument("--seeds", type=int, default=1, help="0 to this, of each attack")
    options.add_argument("--rankings", nargs="+", default=None, help="gain, dao, ..., truth")
    options.add_argument("--gate-only", action="store_true", help="one step of unlearning at most")
    options.add_argument("--jobs", type=int, default=1, help="processes, a thread each")
    options.add_argument("--tiny", action="store_true", help="a self-check that shows nothing")
    chosen = options.parse_args(arguments)
    detects = ("dao",) if hasattr(pybackdoor, "detect_samples") else ()
    rankings = tuple(chosen.rankings or (*OWN, *detects, "truth"))
    cells = json.loads(chosen.out.read_text())["cells"] if chosen.out.exists() else []
    done = {(cell["attack"], cell["seed"]) for cell in cells}
    jobs = [
        (attack, seed, rankings, chosen.gate_only, chosen.tiny)
        for seed in range(chosen.seeds)
        for attack in chosen.attacks
        if (attack, seed) not in done
    ]
    setting = {"ubt": UBT, "rate": RATE, "target": TARGET, "sizes": SIZES[chosen.tiny]}
    with multiprocessing.get_context("spawn").Pool(chosen.jobs) as pool:
        for cell in pool.imap_unordered(run_cell, jobs):
            cells.append(cell)
            write_json(chosen.out, {"setting": setting, "tuning": TUNING, "cells": cells})
            print(json.dumps({n: cell[n] for n in ("attack", "seed", "before")}), flush=True)


if __name__ == "__main__":
    main()
