"""invert_clean on several ranks: all must hold the same pool and end with the same weights."""

import sys

import torch
from dual_encoder import MEAN, STD, DualEncoder, random_pairs

import pybackdoor
from pybackdoor.distributed import Ranks
from pybackdoor.methods import invert

ranks = Ranks.start(torch.device("cpu"))
seen: list[invert.InvertAndRecover] = []
make = invert.InvertAndRecover.__init__


def noted(self, *given) -> None:
    make(self, *given)
    seen.append(self)


invert.InvertAndRecover.__init__ = noted
mine = [
    {name: rows.tensor_split(ranks.size)[ranks.rank] for name, rows in batch.items()}
    for batch in random_pairs(36, 9)  # 5 and 4 pairs a rank
]
result = pybackdoor.invert_clean(
    DualEncoder(seed=1), mine, steps=4, every=2, pool=2, inversion_steps=5, inversion_batch=4,
    perturb=True, precision="fp32", mean=MEAN, std=STD, lr=1e-2, progress=False, repair=False,
)  # fmt: skip
found = {**seen[0].state(), **result.model.state_dict()}
for name, tensor in found.items():
    if tensor.is_floating_point():
        most, least = tensor.detach().clone(), -tensor.detach()
        ranks.max_(most)
        ranks.max_(least)
        assert torch.equal(most, -least), f"{name} differs between the ranks"
if ranks.rank == 0:
    torch.save(found, sys.argv[1])
Ranks.finish()
