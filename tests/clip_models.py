"""Tiny real CLIP models for tests: of open_clip's and of transformers' classes."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch

from pybackdoor.models import LoadedModel, create

MODEL_CFG: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8
    },
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}  # fmt: skip
PREPROCESS_CFG = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "resize_mode": "squash"}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A copy of the tiny configuration; `changes` go into model_cfg."""
    config = {"model_cfg": MODEL_CFG | changes, "preprocess_cfg": PREPROCESS_CFG}
    return json.loads(json.dumps(config))


def config_folder(folder: Path, **changes: Any) -> Path:
    """A folder with open_clip_config.json and no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(tiny_config(**changes)))
    return folder


def tiny_hf(**text: Any):
    """A transformers.CLIPModel of 32 px, 16 tokens of a vocabulary of 100, 32 dimensions."""
    from transformers import CLIPConfig, CLIPModel

    common = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }  # fmt: skip
    words = {
        "max_position_embeddings": 16, "vocab_size": 100, "bos_token_id": 98, "eos_token_id": 99,
        "pad_token_id": 1,
    }  # fmt: skip
    config = CLIPConfig(
        text_config=common | words | text,
        vision_config=common | {"image_size": 32, "patch_size": 8},
        projection_dim=32,
    )
    return CLIPModel(config).eval()


def tokenizer_files(folder: Path) -> Path:
    """A CLIP byte-pair vocabulary of 100 entries and no merges."""
    letters = (string.ascii_lowercase + string.digits + string.punctuation)[:49]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def tiny(seed: int = 0, **changes: Any) -> LoadedModel:
    """The tiny open_clip model with weights of a seed."""
    torch.manual_seed(seed)
    return create(tiny_config(**changes))


def assert_same_model(found: LoadedModel, wanted: LoadedModel) -> None:
    """Equal bits, embeddings, preprocessing and architecture."""
    one, two = found.model.state_dict(), wanted.model.state_dict()
    assert list(one) == list(two)
    for name, value in two.items():
        assert one[name].dtype == value.dtype and torch.equal(one[name], value), name
    tokens = wanted.tokenizer(["a photo of a cat", "two dogs"])
    with torch.no_grad():
        assert torch.equal(found.model.encode_image(IMAGES), wanted.model.encode_image(IMAGES))
        assert torch.equal(found.model.encode_text(tokens), wanted.model.encode_text(tokens))
    assert found.preprocess == wanted.preprocess
    same = ("format", "quick_gelu", "model_cfg", "preprocess_cfg")
    assert {k: found.config[k] for k in same} == {k: wanted.config[k] for k in same}


def snapshot(folder: Path) -> dict[str, bytes]:
    """Relative path -> content of every file below a folder."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}
