"""A run of two ranks with kept image features and one without, and the captions' features.

What rank 0 saw is saved.
"""

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import torch
from dual_encoder import DualEncoder
from training_child import clean, loader

from pybackdoor.distributed import Ranks
from pybackdoor.engine import banks, images, texts
from pybackdoor.engine.images import ImageFeatures
from pybackdoor.models import text_features

ranks = Ranks.start(torch.device("cpu"))
images._FEWEST, images._SHARED = 2, 30
texts._CHUNK = 20  # 83 captions: the last chunk is rank 0's alone
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


def caption_features():
    return texts.CaptionFeatures(
        loader().captions,
        lambda tokens: torch.cat([text_features(model, row) for row in tokens.split(1)]),
        ranks,
        SimpleNamespace(patient=nullcontext),
    )


model, every = DualEncoder().eval().requires_grad_(False), torch.arange(83)
want = torch.cat([text_features(model, row) for row in loader().captions.tokens(every).split(1)])
found["captions"] = torch.equal(caption_features()(every), want)
with mock.patch.object(banks, "host_memory", lambda: 2**40 if ranks.rank == 0 else 0):
    try:
        caption_features()
        found["no room"] = False
    except texts.NoRoom:
        found["no room"] = True
if ranks.rank == 0:
    torch.save(found, sys.argv[1])
Ranks.finish()
