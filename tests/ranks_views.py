"""A run of two ranks with kept image features and one without; what rank 0 saw is saved."""

import sys
from unittest import mock

import torch
from dual_encoder import DualEncoder
from training_child import clean

from pybackdoor.distributed import Ranks
from pybackdoor.engine import images
from pybackdoor.engine.images import ImageFeatures

ranks = Ranks.start(torch.device("cpu"))
images._FEWEST, images._SHARED = 2, 30
seen = 0
encode = DualEncoder.encode_image


def counted(self, x):
    global seen
    if torch.is_grad_enabled():
        return encode(self, x)
    seen += len(x)
    # Row by row: a CPU's products of few rows may be rounded otherwise than those of many.
    return torch.cat([encode(self, row) for row in x.split(1)])


options = {"steps": None, "epochs": 6, "views": 2, "repair": False}
with mock.patch.object(DualEncoder, "encode_image", counted):
    got = clean(None, **options)
    found = {"encoded": seen}
    seen = 0
    with mock.patch.object(ImageFeatures, "__call__", lambda self, x: self._encode(x)):
        want = clean(None, **options)
    found["encoded alone"] = seen
found["same"] = got.history == want.history and all(
    torch.equal(tensor, want.model.state_dict()[name])
    for name, tensor in got.model.state_dict().items()
)
if ranks.rank == 0:
    torch.save(found, sys.argv[1])
Ranks.finish()
