"""A small cleaning run that keeps checkpoints; prints READY before its first step, then the result.

    python training_child.py FOLDER [--steps N] [--minutes M] [--disk-errors P]

It resumes from what the folder holds. --disk-errors: share of the writes that fail halfway.
"""

import argparse
import errno
import random
import warnings
from unittest import mock

import safetensors.torch
import torch
from dual_encoder import MEAN, STD, DualEncoder, random_pairs

import pybackdoor
from pybackdoor.data import PairLoader, pairs_from_arrays
from pybackdoor.models import weights_sha256


def loader() -> PairLoader:
    whole = random_pairs(83, 83)[0]
    texts = [" ".join(map(str, row)) for row in whole["tokens"].tolist()]

    def tokenizer(texts):
        return torch.tensor([[int(w) for w in t.split()] for t in texts])

    pairs = pairs_from_arrays(whole["images"].numpy(), texts)
    return PairLoader(pairs, tokenizer, batch_size=16, seed=3)


def clean(folder, steps=60, pairs=None, **options):
    """The run; folder None for one without checkpoints."""
    kept = {} if folder is None else {"folder": folder, "resume": True}
    fixed = {"precision": "fp32", "mean": MEAN, "std": STD, "progress": False, "lr": 1e-2}
    model = DualEncoder(seed=4, dropout=0.3)
    return pybackdoor.par_clean(model, pairs or loader(), steps=steps, **fixed | kept | options)


def failing(share: float):
    """save_file that writes half of its file and fails, this often."""
    whole = safetensors.torch.save_file

    def save_file(tensors, path):
        whole(tensors, path)
        if random.random() < share:
            with open(path, "r+b") as file:
                file.truncate(random.randrange(1, 2000))
            raise OSError(random.choice([errno.ENOSPC, errno.EIO]), "injected", str(path))

    return mock.patch("safetensors.torch.save_file", save_file)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--disk-errors", type=float, default=0.0)
    options = parser.parse_args()
    print("READY", flush=True)
    with failing(options.disk_errors), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            result = clean(options.folder, options.steps, save_minutes=options.minutes)
        finally:
            for warning in said:
                print("WARNED", warning.message, flush=True)
    print("DONE", len(result.history), weights_sha256(result.model), flush=True)


if __name__ == "__main__":
    main()
