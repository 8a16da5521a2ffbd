"""What the baselines' tests share: a loader whose captions can be reworded, and short runs."""

import torch
from dual_encoder import MEAN, STD, random_pairs

import pybackdoor
from pybackdoor.data import PairLoader, pairs_from_arrays

RUNS = {
    "cleanclip": pybackdoor.cleanclip_clean,
    "roclip": pybackdoor.roclip_clean,
    "ft_sam": pybackdoor.ft_sam_clean,
}
FIXED = {
    "precision": "fp32",
    "mean": MEAN,
    "std": STD,
    "progress": False,
    "lr": 1e-2,
    "repair": False,
}


def tokenizer(texts: list[str]) -> torch.Tensor:  # [n, 6]
    rows = [[int(word) for word in text.split()][:6] for text in texts]
    return torch.tensor([row + [0] * (6 - len(row)) for row in rows], device="cpu")


def loader(pairs: int = 83, batch_size: int = 16, seed: int = 3, **options) -> PairLoader:
    whole = random_pairs(pairs, pairs)[0]
    texts = [" ".join(map(str, row)) for row in whole["tokens"].tolist()]
    made = pairs_from_arrays(whole["images"].numpy(), texts)
    return PairLoader(made, tokenizer, batch_size=batch_size, seed=seed, **options)
