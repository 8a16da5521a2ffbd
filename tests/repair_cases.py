"""Models of every kind of last linear map, copies that have drifted, and their embeddings."""

from __future__ import annotations

import copy

import pytest
import torch
from clip_models import tiny, tiny_hf
from dual_encoder import DualEncoder
from torch import nn
from torch.nn.functional import kl_div, normalize

from pybackdoor.models import HFClip, image_features, text_features

PAIRS = 60
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
TIMM = {"timm_model_name": "test_resnet", "timm_model_pretrained": False, "image_size": 32}
TEXT = {"context_length": 16, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2}
OPEN_CLIP = {
    "ViT": {},
    "ResNet": {"vision_cfg": RESNET},
    "text tower of its own": {"custom_text": True},
    "text projection with a bias": {"text_cfg": TEXT | {"proj_bias": True}},
    "timm, linear head": {"vision_cfg": TIMM | {"timm_proj": "linear"}},
    "timm, MLP head": {"vision_cfg": TIMM | {"timm_proj": "mlp"}},
    "timm, its own classifier": {"vision_cfg": TIMM | {"timm_proj": "", "timm_pool": "avg"}},
}


class Shared(nn.Module):
    """Both towers end in one layer; ``crossed``, they take its square matrix either way round."""

    def __init__(self, crossed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.crossed, self.logit_scale = crossed, nn.Parameter(torch.tensor(2.0))
        self.pixels, self.words = nn.Linear(768, 8), nn.EmbeddingBag(50, 8)
        self.last = nn.Linear(8, 8, bias=not crossed)

    def encode_image(self, x):
        return self.last(self.pixels(x.flatten(1)).tanh())

    def encode_text(self, tokens):
        rows = self.words(tokens).tanh()
        return rows @ self.last.weight if self.crossed else self.last(rows)


class Unfoldable(DualEncoder):
    """A norm follows the last linear map of its text."""

    def encode_text(self, tokens):
        return self.ln_final(super().encode_text(tokens))


def make(kind: str) -> nn.Module:
    if kind == "Hugging Face":
        pytest.importorskip("transformers")
    with torch.random.fork_rng():
        if kind in OPEN_CLIP:
            return tiny(0, **({"text_cfg": TEXT} | OPEN_CLIP[kind])).model.eval()
        torch.manual_seed(0)
        own = {"DualEncoder": DualEncoder, "shared": Shared}
        return own[kind]().eval() if kind in own else HFClip(tiny_hf())


def batches_for(model: nn.Module, n: int = PAIRS, seed: int = 0) -> list:
    """Normalised floats and tokens, in two batches."""
    if isinstance(model, DualEncoder | Shared):
        side, length, words = 16, 6, 50
    else:
        side, length, words = 32, 16, 98
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, side, side, generator=g)
    tokens = torch.randint(2, words - 1, (n, length), generator=g)
    tokens[:, -1] = 99 if words == 98 else words - 1  # the end of the text, where it is pooled
    dtype = next(model.parameters()).dtype
    images = images.to(dtype)
    return [(images[: n // 2], tokens[: n // 2]), (images[n // 2 :], tokens[n // 2 :])]


def drifted(model: nn.Module, seed: int = 1) -> nn.Module:
    moved = copy.deepcopy(model)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in moved.parameters():
            if p.ndim > 1:
                p += 0.3 * p.std() * torch.randn(p.shape, generator=g).to(p.dtype)
    return moved


@torch.no_grad()
def features(model: nn.Module, batches: list) -> torch.Tensor:
    """[2, n, D] fp64 unit rows: images, texts."""
    images, texts = (torch.cat(x) for x in zip(*batches, strict=True))
    rows = torch.stack([image_features(model, images), text_features(model, texts)])
    return normalize(rows.double(), dim=-1)


def judged(rows: torch.Tensor, old: torch.Tensor, scale: float) -> dict[str, float]:
    """Drift repair's figures of [2, n, D] rows against the reference's, by torch's functions."""
    apart = (rows - old).square().sum(2).mean(1)
    own = (scale * rows[0] @ rows[1].T).log_softmax(1)
    found = {"image": apart[0].item(), "text": apart[1].item()}
    for name, image, text in (("old_images", old[0], rows[1]), ("old_texts", rows[0], old[1])):
        other = (scale * image @ text.T).log_softmax(1)
        found[name] = kl_div(other, own, log_target=True, reduction="batchmean").item()
    return found


def worth(figures: dict[str, float]) -> float:
    """What drift repair makes small."""
    close = (figures["image"] + figures["text"]) / 2
    return close + figures["old_images"] + 2 * figures["old_texts"]


def turn(dim: int, seed: int = 5) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=torch.float64))[0]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True)
    )


KINDS = [*OPEN_CLIP, "Hugging Face", "DualEncoder", "shared"]
