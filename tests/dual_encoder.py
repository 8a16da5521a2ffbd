"""A small dual encoder in plain torch: the smallest thing that the protocol calls a CLIP model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pybackdoor.batches import Batch
from pybackdoor.engine import Given

GIVEN = Given(3, 0, Batch(torch.empty(0), torch.empty(0), None), torch.arange(23))  # a step
MEAN, STD = (0.4, 0.45, 0.5), (0.25, 0.2, 0.3)


class DualEncoder(nn.Module):
    """16 px images, 6 tokens of a vocabulary of 50, 8 dimensions."""

    def __init__(self, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.image = nn.Sequential(
                nn.Conv2d(3, 8, 3, stride=2, padding=1),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.AdaptiveAvgPool2d(4),
                nn.Flatten(),
                nn.Linear(128, 8),
            )
            self.text = nn.Sequential(nn.EmbeddingBag(50, 8), nn.Linear(8, 8))
            self.ln_final = nn.LayerNorm(8)
            self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def encode_image(self, x: Tensor) -> Tensor:  # [n, 3, 16, 16]
        return self.image(x)

    def encode_text(self, tokens: Tensor) -> Tensor:  # [n, 6]
        return self.text[1](self.ln_final(self.text[0](tokens)))


def random_pairs(n: int, batch: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Batches of uint8 images whose colour the caption's tokens tell."""
    g = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 4, (n,), generator=g)
    images = torch.randint(0, 256, (n, 16, 16, 3), generator=g, dtype=torch.uint8)
    for i, k in enumerate(kind.tolist()):
        if k < 3:
            images[i, :, :, k] = 255
    tokens = torch.randint(10, 50, (n, 6), generator=g)
    tokens[:, 0] = kind + 1
    ids = torch.arange(n) + 1000
    return [
        {"images": images[s], "tokens": tokens[s], "ids": ids[s]}
        for s in (slice(i, i + batch) for i in range(0, n, batch))
    ]
