"""Detection judged on planted poison: every method, on small models trained on poisoned CIFAR-10.

For each trigger 1 % of the pairs are poisoned, the demo's small ResNet is trained on them, and the
training pairs are scored. Reads cifar10_32.npz of $PYBACKDOOR_DATA; one seed, some minutes per
trigger on a CPU core. `--references` compares how many pairs neighbours are sought among.

    python benchmarks/detect_planted.py --triggers badnet blended badnet_stripes --out figures.json
"""

from __future__ import annotations

import argparse
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

import pybackdoor
from pybackdoor.data import labelled_from_arrays, pairs_from_labelled
from pybackdoor.demo.config import DemoConfig
from pybackdoor.demo.data import Pictures
from pybackdoor.demo.story import TEMPLATES, _new_model

TARGET = "truck"


def read_pictures(count: int) -> Pictures:
    """The first pictures of the training split, and 2,000 of the test split."""
    pack = np.load(Path(os.environ["PYBACKDOOR_DATA"]) / "cifar10_32.npz", allow_pickle=False)
    raw, ends = pack["data"].tobytes(), pack["offs"]
    sets = []
    for split, wanted in ((0, count), (1, 2000)):
        rows = np.flatnonzero(pack["split"] == split)[:wanted]
        files = (raw[ends[i] : ends[i + 1]] for i in rows)
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(f)).convert("RGB")) for f in files])
        names = [str(name) for name in pack["classes"]]
        sets.append(labelled_from_arrays(pixels, pack["label"][rows].astype(np.int64), names))
    return Pictures._measured(*sets, "CIFAR-10")


def poisoned_model(pictures: Pictures, name: str, options: argparse.Namespace):
    """(trained model, poisoned pairs, manifest)."""
    config = DemoConfig(seed=options.seed)
    fresh = _new_model(config, pictures)
    pairs = pairs_from_labelled(pictures.train, TEMPLATES, options.seed)
    spec = pybackdoor.trigger(name, seed=options.seed)
    planted = {"target": TARGET, "templates": TEMPLATES, "rate": options.rate, "seed": options.seed}
    result = pybackdoor.poison(
        fresh.model, pairs, spec, **planted, tokenizer=fresh.tokenizer, steps=options.steps,
        batch_size=config.batch_size, lr=config.train_lr, warmup=30, weight_decay=0.05,
        precision="fp32", device="cpu", test=pictures.test, progress=False,
    )  # fmt: skip
    return fresh._replace(model=result.model), pybackdoor.poison_pairs(pairs, spec, **planted)[0], \
        result.manifest  # fmt: skip
