"""Detection judged on planted poison: every method, on small models trained on poisoned CIFAR-10.

For each trigger 1 % of the pairs are poisoned, the demo's small ResNet is trained on them, and the
training pairs are scored. Reads cifar10_32.npz of $PYBACKDOOR_DATA; one seed, some minutes per
trigger on a CPU core. `--references` compares how many pairs neighbours are sought among; the
default was chosen so on `--triggers checkerboard`.

    python benchmarks/detect_planted.py --out figures.json
"""

from __future__ import annotations

import argparse
import io
import json
import os
import time
from pathlib import Path

import numpy as np
from PIL import Image

import pybackdoor
from pybackdoor.data import PairLoader, labelled_from_arrays, pairs_from_labelled
from pybackdoor.demo.config import DemoConfig
from pybackdoor.demo.data import Pictures
from pybackdoor.demo.story import TEMPLATES, _new_model
from pybackdoor.detect import METHODS, DetectionResult, planted
from pybackdoor.detect.reading import read
from pybackdoor.detect.samples import REFERENCE, K, among_neighbours
from pybackdoor.features import FeatureReader
from pybackdoor.manifest import Manifest
from pybackdoor.models import MANIFEST

TARGET = "truck"


def read_pictures(count: int) -> Pictures:
    """Pictures of the training split, and 2,000 of the test split, drawn: they lie by class."""
    pack = np.load(Path(os.environ["PYBACKDOOR_DATA"]) / "cifar10_32.npz", allow_pickle=False)
    raw, ends = pack["data"].tobytes(), pack["offs"]
    sets = []
    for split, wanted in ((0, count), (1, 2000)):
        of_split = np.flatnonzero(pack["split"] == split)
        rows = np.random.default_rng(split).permutation(of_split)[:wanted]
        files = (raw[ends[i] : ends[i + 1]] for i in rows)
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(f)).convert("RGB")) for f in files])
        names = [str(name) for name in pack["classes"]]
        sets.append(labelled_from_arrays(pixels, pack["label"][rows].astype(np.int64), names))
    return Pictures._measured(*sets, "CIFAR-10")


def poisoned_model(pictures: Pictures, name: str, options: argparse.Namespace):
    """(model, the pairs before they were poisoned, manifest); trained, or read from --models."""
    config = DemoConfig(seed=options.seed)
    pairs = pairs_from_labelled(pictures.train, TEMPLATES, options.seed)
    kept = None if options.models is None else options.models / name
    if kept is not None and kept.exists():
        return pybackdoor.load(kept), pairs, Manifest.load(kept / MANIFEST)
    fresh = _new_model(config, pictures)
    result = pybackdoor.poison(
        fresh.model, pairs, pybackdoor.trigger(name, seed=options.seed), target=TARGET,
        templates=TEMPLATES, rate=options.rate, tokenizer=fresh.tokenizer, steps=options.steps,
        batch_size=config.batch_size, lr=config.train_lr, warmup=30, weight_decay=0.05,
        precision="fp32", seed=options.seed, device="cpu", test=pictures.test, progress=False,
    )  # fmt: skip
    loaded = fresh._replace(model=result.model)
    if kept is not None:
        pybackdoor.save(loaded, kept, manifest=result.manifest)
    return loaded, pairs, result.manifest


def overfitted(loaded, pairs, cosines, options):
    """The model after some steps on the pairs whose cosines are lowest (UBT's first stages)."""
    weak = np.sort(np.argsort(cosines, kind="stable")[: round(options.weak * len(pairs))])
    loader = PairLoader(pairs.subset(weak), loaded.tokenizer, batch_size=128, seed=options.seed)
    return pybackdoor.finetune_clean(
        loaded.model, loader, steps=options.overfit_steps, lr_start=options.overfit_lr,
        lr=options.overfit_lr / 10, augment=False, precision="fp32", device="cpu",
        seed=options.seed, progress=False,
    ).model  # fmt: skip


def figures(loaded, pairs, truth, options) -> list[dict]:
    """One dict per method and reference: AUROC, precision and recall at the number planted."""
    reader = FeatureReader(loaded.model, loaded.tokenizer)
    found = read([reader], pairs, images=True, cosines=True)
    features, cosines = found.images, found.cosines[0]
    after = None
    if "gain" in options.methods:
        model = overfitted(loaded, pairs, cosines, options)
        after = read(
            [FeatureReader(model, loaded.tokenizer)], pairs, images=False, cosines=True
        ).cosines[0]
    rows = []
    for name in options.methods:
        method = METHODS[name]
        for reference in options.references if method.takes == "neighbours" else [None]:
            settings = {"k": options.k, "reference": reference, "seed": options.seed}
            began = time.perf_counter()
            if method.takes == "neighbours":
                scores = among_neighbours(method, features, settings, False)
            else:
                scores = method.function(*([cosines] if name != "gain" else [cosines, after]))
            result = DetectionResult(scores, pairs.ids, name, settings, truth=truth)
            measured = result.measures()
            rows.append(
                {
                    "method": name,
                    "reference": reference,
                    "auroc": measured["auroc"],
                    "seconds": time.perf_counter() - began,
                    **measured["at"][0],
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--triggers", nargs="+", default=["badnet", "blended", "badnet_stripes"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--references", nargs="+", type=int, default=[REFERENCE, 0])
    parser.add_argument("--k", type=int, default=K)
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--weak", type=float, default=0.05, help="share of pairs overfitted on")
    parser.add_argument("--overfit-steps", type=int, default=40)
    parser.add_argument("--overfit-lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", type=Path, help="folder to keep trained models in, and use")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    pictures, answer = read_pictures(options.images), {}
    for name in options.triggers:
        loaded, pairs, manifest = poisoned_model(pictures, name, options)
        pairs, truth = planted(pairs, manifest)
        rows = figures(loaded, pairs, truth, options)
        shown = {key: manifest.results[key]["value"] for key in ("ca", "asr_nontarget")}
        answer[name] = {"planted": int(truth.sum()), **shown, "figures": rows}
        print(f"{name}: {len(pairs)} pairs, {truth.sum()} planted, {shown}")
        for row in rows:
            print(
                f"  {row['method']:<12} reference {row['reference']!s:>5}  AUROC "
                f"{row['auroc']:.3f}  precision@{row['k']} {row['precision']:.3f}  "
                f"{row['seconds']:.1f} s",
                flush=True,
            )
    if options.out is not None:
        settings = {key: str(value) for key, value in vars(options).items()}
        options.out.write_text(json.dumps({"options": settings, "triggers": answer}, indent=2))


if __name__ == "__main__":
    main()
