"""UBT-style unlearning by one process or by several; what rank 0 found is saved."""

import sys

import numpy as np
import torch
from ubt_world import MEAN, STD, Planted, WordTokenizer, planted_pairs

import pybackdoor
from pybackdoor.data import PairLoader
from pybackdoor.distributed import Ranks

ranks = Ranks.start(torch.device("cpu"))
pairs, truth = planted_pairs()
found = {}
common = {
    "mean": MEAN, "std": STD, "progress": False, "augment": False, "precision": "fp32", "k": 40,
    "device": "cpu", "gate_sets": 199, "forget_batch": 7, "lr": 1e-2, "check_every": 2,
}  # fmt: skip
for forget in ("contrastive", "hinge"):
    result = pybackdoor.ubt_clean(
        Planted(), PairLoader(pairs, WordTokenizer(), batch_size=33),
        scores=truth + np.linspace(0, 0.5, 600), forget=forget, steps=5, **common,
    )  # fmt: skip
    found |= {f"{forget} {n}": t for n, t in result.model.state_dict().items()}
    for k, record in enumerate(result.history):
        found[f"{forget} loss {k}"] = torch.tensor(record["loss"])
kept = pybackdoor.ubt_clean(  # the looks are rank 0's, whatever each rank's own pairs are
    Planted(), PairLoader(pairs, WordTokenizer(), batch_size=33),
    PairLoader(pairs.subset(np.flatnonzero(~truth)), WordTokenizer(), batch_size=24),
    scores=truth + np.linspace(0, 0.5, 600), steps=4, **common,
)  # fmt: skip
looks = [kept.report[name] for name in ("checks", "ways", "way")]
if ranks.from_first(looks) != looks:
    raise SystemExit("ranks saw different looks")
found |= {f"kept {n}": t for n, t in kept.model.state_dict().items()}
ranked = pybackdoor.ubt_clean(
    Planted(), PairLoader(pairs, WordTokenizer(), batch_size=33), rank="gain", overfit_steps=4,
    overfit_loss="cosine", overfit_lr=1e-3, steps=1, gate_excess=2.0, **common,
)  # fmt: skip
found["scores"] = torch.from_numpy(ranked.scores)
if ranks.rank == 0:
    torch.save(found, sys.argv[1])
Ranks.finish()
