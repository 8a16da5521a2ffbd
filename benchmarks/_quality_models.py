"""The quality matrix's architectures: small dual encoders, fresh, from a seed.

An architecture is whatever gives a ``LoadedModel`` for an image size, the pixels' statistics and a
seed. Weights are kept by name, so its class is free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from _quality_towers import Pretrained

from pybackdoor.models import LoadedModel, create

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}


class Architecture(Protocol):
    """A dataclass: its fields are part of what a model's weights depend on."""

    def check(self) -> None:
        """Raises where something is missing without which no model can be made."""

    def make(
        self, image_size: int, mean: list[float], std: list[float], seed: int
    ) -> LoadedModel: ...


@dataclass(frozen=True)
class OpenClip:
    """A CLIP of open_clip's own classes: an image tower and a two-layer text transformer.

    Attributes:
        vision: of its image tower.
        stem_at: a ResNet for smaller images is built for this size, in pixels, and its first
            convolution does not stride: open_clip's stem divides the side by four, which leaves
            little of 32 pixels and less of a patch of five.
        embed_dim: D.
    """

    vision: dict[str, Any]
    stem_at: int = 0
    embed_dim: int = 64

    def check(self) -> None:
        """Its weights are drawn: there is nothing to miss."""

    def make(self, image_size: int, mean: list[float], std: list[float], seed: int) -> LoadedModel:
        built_for = max(image_size, self.stem_at)
        config = {
            "embed_dim": self.embed_dim,
            "vision_cfg": {"image_size": built_for, **self.vision},
            "text_cfg": TEXT,
        }
        preprocess = {"size": image_size, "mean": mean, "std": std}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            loaded = create({"model_cfg": config, "preprocess_cfg": preprocess})
        visual = loaded.model.visual
        if built_for != image_size:
            visual.conv1.stride, visual.image_size = (1, 1), image_size
        visual.to(memory_format=torch.channels_last)  # a third less time for convolutions on a CPU
        return loaded


# resnet: 0.3 M parameters, first maps of 16 x 16 for images of 32 and of 64 px alike. vit: 0.8 M
# parameters; with patches of 4 px in place of 8 a step costs twice as much.
ARCHITECTURES: dict[str, Architecture] = {
    "resnet": OpenClip({"layers": [1, 1, 1, 1], "width": 8, "head_width": 32}, stem_at=64),
    "vit": OpenClip({"layers": 4, "width": 128, "head_width": 32, "patch_size": 8}),
    "pretrained": Pretrained(),
}
ON_REQUEST = ("pretrained",)  # computed where --only names it: a cell takes minutes, and an extra
