"""Drift repair by several processes; rank 0 saves what all of them found."""

import sys

import torch
import torch.distributed as dist
from dual_encoder import DualEncoder
from repair_cases import batches_for, drifted

import pybackdoor
from pybackdoor.distributed import Ranks

ranks = Ranks.start(torch.device("cpu"))
model = DualEncoder(seed=1).double().eval()
mine = [
    tuple(part.tensor_split([7])[ranks.rank] for part in batch) for batch in batches_for(model, 40)
]
mended = pybackdoor.repair_drift(drifted(model), model, mine, device="cpu")
every: list = [None] * ranks.size
dist.all_gather_object(every, mended.model.state_dict())
found = {str(rank): state for rank, state in enumerate(every)}
found["report"] = mended.report


class Odd(DualEncoder):
    """The first rank's text tower ends in a norm."""

    def encode_text(self, tokens):
        rows = super().encode_text(tokens)
        return self.ln_final(rows) if ranks.rank == 0 else rows


said = "no error"
try:
    pybackdoor.repair_drift(Odd().double(), Odd().double(), mine, device="cpu")
except ValueError as error:
    said = str(error)
dist.all_gather_object(every, said)
found["refused"] = every[1]
if ranks.rank == 0:
    torch.save(found, sys.argv[1])
Ranks.finish()
