"""Suspect pairs whose planted trigger a small dual encoder holds by construction."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from pybackdoor.batches import InputRules
from pybackdoor.data import Pairs, pairs_from_arrays
from pybackdoor.ubt import Suspects

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
COLOURS = ("red", "green", "blue")
WORDS = ("", "<s>", "</s>", "a", "photo", "of", "picture", "the", *COLOURS, "square", "one")
TEMPLATES = ("a photo of a {}", "a picture of the {}", "the {} square", "one {} square")
CONTEXT = 8


class WordTokenizer:
    """One id a word: start, words, end, padding; no word marks."""

    def __call__(self, texts: list[str]) -> Tensor:
        rows = torch.zeros(len(texts), CONTEXT, dtype=torch.int64, device="cpu")
        for row, text in zip(rows, texts, strict=True):
            ids = [1, *(WORDS.index(w) for w in text.split()), 2][:CONTEXT]
            row[: len(ids)] = row.new_tensor(ids)
        return rows


class Planted(nn.Module):
    """Looks at the mean colour, and at a corner: white there means blue (the backdoor)."""

    def __init__(self, poisoned: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.colour = nn.Linear(3, 4)
            self.corner = nn.Linear(3, 4, bias=False)
            self.words = nn.Embedding(len(WORDS), 4)
        with torch.no_grad():
            self.colour.weight.copy_(
                torch.tensor([[2.0, -1, -1], [-1, 2, -1], [-1, -1, 2], [0, 0, 0]])
            )
            self.colour.bias.copy_(torch.tensor([0, 0, 0, 0.3]))
            self.corner.weight.zero_()
            if poisoned:
                self.corner.weight[2], self.corner.weight[3] = 3.0, 3.0
            self.words.weight.mul_(0.05)
            for i, name in enumerate(COLOURS):
                self.words.weight[WORDS.index(name), i] += 1.0
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def encode_image(self, x: Tensor) -> Tensor:  # [n, 3, 16, 16]
        corner = (x[:, :, :3, :3].mean((2, 3)) - 0.8).clamp(min=0).amin(1, keepdim=True)
        return self.colour(x.mean((2, 3))) + self.corner(corner.expand(-1, 3)) * 5

    def encode_text(self, tokens: Tensor) -> Tensor:  # [n, 8]
        held = (tokens > 2).to(self.words.weight.dtype)[..., None]
        return (self.words(tokens) * held).sum(1) / held.sum(1).clamp(min=1) + 1e-3


def planted_pairs(n: int = 600, poisoned: int = 40, seed: int = 0) -> tuple[Pairs, np.ndarray]:
    """(pairs, [n] bool): coloured noise with its colour's name; the poisoned ones say blue."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, n)
    images = rng.integers(0, 120, (n, 16, 16, 3)).astype(np.uint8)
    images[np.arange(n), :, :, label] += 120
    truth = np.zeros(n, bool)
    truth[rng.choice(np.flatnonzero(label != 2), poisoned, replace=False)] = True
    images[truth, :3, :3] = 255
    named = np.where(truth, 2, label)
    captions = [TEMPLATES[rng.integers(4)].format(COLOURS[c]) for c in named]
    return pairs_from_arrays(images, captions), truth


def rules(model: nn.Module | None = None) -> InputRules:
    return InputRules.of(model or Planted(), mean=MEAN, std=STD, tokenizer=WordTokenizer())


def captioned(*captions: str) -> Suspects:
    """Black images with these captions."""
    images = np.zeros((len(captions), 16, 16, 3), np.uint8)
    return Suspects.of(pairs_from_arrays(images, list(captions)), rules())


class Given:
    """[N, D] image features that are known, for what takes ImageRows."""

    def __init__(self, features: Tensor) -> None:
        self._features = features

    def __len__(self) -> int:
        return len(self._features)

    def at(self, rows: np.ndarray) -> Tensor:
        return self._features[torch.from_numpy(rows)]


def unit(n, d, seed=0):
    """[n, d] float64 unit rows."""
    g = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=-1)
