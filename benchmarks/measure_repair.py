"""What drift repair leaves of PAR's drift, by the number of pairs that it is fitted on.

    python benchmarks/measure_repair.py cifar10_32.npz

The pack (``data``: encoded images end to end, ``offs``, ``label``, ``split``, ``classes``) lies in
the folder that PYBACKDOOR_DATA names. The demo's model is trained with BadNet-Stripes planted,
cleaned by PAR on 10,000 clean pairs held out, and repaired on more and more of them; every row is
measured on test images that nothing was fitted on. One JSON object a line.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from pybackdoor import evaluate, par_clean, poison, repair_drift, trigger
from pybackdoor.data import Labelled, PairLoader, labelled_from_arrays, pairs_from_labelled
from pybackdoor.demo.config import DemoConfig
from pybackdoor.demo.data import Pictures
from pybackdoor.demo.story import TEMPLATES, _new_model

CLEAN, TEST = 10_000, 2_000
PAIRS = (16, 64, 256, 512, 1024, 4096, CLEAN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pack", help="file in the folder PYBACKDOOR_DATA")
    parser.add_argument("--train-steps", type=int, default=450)
    parser.add_argument("--clean-steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    train, test = read_pack(Path(os.environ["PYBACKDOOR_DATA"]) / given.pack)
    order = np.random.default_rng(given.seed).permutation(len(train))
    held_out, planted = train.subset(order[:CLEAN]), train.subset(order[CLEAN:])
    test = test.subset(np.random.default_rng(given.seed).permutation(len(test))[:TEST])
    config, spec, target = DemoConfig(), trigger("badnet_stripes"), train.classes[-2]
    pixels = train.images.take(order[:2000]) / 255
    mean, std = pixels.mean((0, 1, 2)).tolist(), pixels.std((0, 1, 2)).tolist()
    fresh = _new_model(config, Pictures(train, test, False, mean, std, given.pack))
    common = {"precision": "fp32", "seed": given.seed, "device": "cpu", "progress": False}
    began = time.perf_counter()

    def say(what: str, model, reference=None, **more) -> None:
        found = evaluate(
            model, test, tokenizer=fresh.tokenizer, templates=TEMPLATES, trigger=spec,
            target=target, reference=reference,
        )  # fmt: skip
        row = {"model": what, "ca": found.ca.value, "asr": found.asr_nontarget.value}
        if found.drift is not None:
            drift = found.drift
            row |= {"image": drift.image.value, "text": drift.text.value}
            row |= {"old_images": drift.old_images.value, "old_texts": drift.old_texts.value}
        row = {k: v if isinstance(v, str) else round(v, 4) for k, v in row.items()}
        print(json.dumps(row | more | {"at_s": round(time.perf_counter() - began)}), flush=True)

    dirty = poison(
        fresh.model, pairs_from_labelled(planted, TEMPLATES, given.seed), spec, target=target,
        tokenizer=fresh.tokenizer, templates=TEMPLATES, rate=0.01, steps=given.train_steps,
        batch_size=256, lr=config.train_lr, warmup=30, weight_decay=0.05, **common,
    ).model  # fmt: skip
    say("poisoned", dirty)
    pairs = pairs_from_labelled(held_out, TEMPLATES, given.seed)
    loader = PairLoader(pairs, fresh.tokenizer, batch_size=256, drop_last=False, seed=given.seed)
    cleaned = par_clean(
        dirty, loader, steps=given.clean_steps, lr_start=config.lr_start, lr=config.lr,
        repair=False, **common,
    ).model  # fmt: skip
    say("cleaned", cleaned, dirty)
    for n in PAIRS:
        loader = PairLoader(pairs, fresh.tokenizer, batch_size=min(n, 256), seed=given.seed)
        mended = repair_drift(cleaned, dirty, loader, pairs=n, device="cpu")
        report = {k: mended.report[k] for k in ("pairs", "rank", "error", "seconds")}
        report["fit"] = [round(mended.report[f"{t}_after"], 4) for t in ("image", "text")]
        say(f"repaired, {n} pairs", mended.model, dirty, **report)


def read_pack(path: Path) -> tuple[Labelled, Labelled]:
    """Training and test pictures of a pack."""
    with np.load(path, allow_pickle=False) as pack:
        raw, offsets = pack["data"].tobytes(), pack["offs"].tolist()
        split, labels = pack["split"], pack["label"].astype(np.int64)
        classes = [str(name) for name in pack["classes"]]
    encoded = (raw[a:b] for a, b in pairwise(offsets))
    images = np.stack([np.asarray(Image.open(io.BytesIO(r)).convert("RGB")) for r in encoded])
    found = (labelled_from_arrays(images[split == s], labels[split == s], classes) for s in (0, 1))
    return tuple(found)


if __name__ == "__main__":
    main()
