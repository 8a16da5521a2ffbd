"""The quality matrix's architectures: small dual encoders, fresh, from a seed.

A model with pretrained towers joins as one more entry: whatever gives a ``LoadedModel`` for an
image size, the pixels' statistics and a seed. Weights are kept by name, so its class is free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pybackdoor.models import LoadedModel, create

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}


class Architecture(Protocol):
    """A dataclass: its fields are part of what a model's weights depend on."""

    def make(
        self, image_size: int, mean: list[float], std: list[float], seed: int
    ) -> LoadedModel: ...


@dataclass(frozen=True)
class OpenClip:
    """A CLIP of open_clip's own classes: an image tower and a two-layer text transformer."""

    vision: dict[str, Any]
    embed_dim: int = 64

    def make(self, image_size: int, mean: list[float], std: list[float], seed: int) -> LoadedModel:
        vision = {"image_size": image_size, **self.vision}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return create(
                {
                    "model_cfg": {
                        "embed_dim": self.embed_dim, "vision_cfg": vision, "text_cfg": TEXT
                    },
                    "preprocess_cfg": {"size": image_size, "mean": mean, "std": std},
                }
            )  # fmt: skip


# resnet: the demo's at two thirds of its width, 1.3 M parameters. vit: 0.8 M parameters; with
# patches of 4 px in place of 8 a step would cost twice as much.
ARCHITECTURES: dict[str, Architecture] = {
    "resnet": OpenClip({"layers": [1, 1, 1, 1], "width": 16, "head_width": 32}),
    "vit": OpenClip({"layers": 4, "width": 128, "head_width": 32, "patch_size": 8}),
}
