"""Each baseline by one process or by several; what rank 0 found is saved."""

import sys

import torch
from baseline_cases import FIXED, RUNS, loader
from dual_encoder import DualEncoder

from pybackdoor.distributed import Ranks

ranks = Ranks.start(torch.device("cpu"))
cases = {name: (name, {}) for name in RUNS} | {"ft_sam adaptive": ("ft_sam", {"adaptive": True})}
cases["roclip"] = ("roclip", {"pool_size": 11})
found = {}
for title, (name, own) in cases.items():
    pairs = loader(19, 7, drop_last=False)  # shares of 4 and 3, 4 and 3, 3 and 2
    result = RUNS[name](DualEncoder(seed=1).double(), pairs, epochs=3, **own, **FIXED)
    kept = {
        f"{record['step']} {term}": torch.tensor(value, dtype=torch.float64)
        for record in result.history
        for term, value in record.items()
    }
    found[title] = {**kept, **result.model.state_dict()}
if ranks.rank == 0:
    torch.save(found, sys.argv[1])
Ranks.finish()
