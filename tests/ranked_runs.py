"""Small cleaning runs for test_ranks.py, which calls them on several processes."""

from __future__ import annotations

import math
import os
import signal
from typing import Any

import torch
from dual_encoder import MEAN, STD, random_pairs
from torch import Tensor, nn

import pybackdoor
from pybackdoor.data import PairLoader, pairs_from_arrays
from pybackdoor.distributed import Ranks

FIXED = {
    "precision": "fp32",
    "mean": MEAN,
    "std": STD,
    "progress": False,
    "lr": 1e-2,
    "repair": False,
}


class Block(nn.Module):
    """A residual block; 10 rows are uneven over 4 ranks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 10), nn.Linear(10, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.ln(x)).relu())


class BlockEncoder(nn.Module):
    """Two towers of blocks, with all that is awkward to shard.

    The towers share their projection, the last blocks of both a layer; there are batch norm, a
    scalar, a parameter that no loss reaches, one with a single row, and positions that captions are
    cut to.
    """

    lengths: set[int] = set()  # of captions, as they came

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Sequential(
                nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 12)
            )
            self.image_blocks = nn.ModuleList(Block(12) for _ in range(3))
            self.tokens = nn.Embedding(50, 12)
            self.positional_embedding = nn.Parameter(torch.randn(24, 12) * 0.1)
            self.register_buffer("attn_mask", torch.ones(24, 24).tril(), persistent=False)
            self.text_blocks = nn.Sequential(*(Block(12) for _ in range(3)))
            self.text_blocks[2].up = self.image_blocks[2].up
            self.head = nn.Linear(12, 8)
            self.text_head = nn.Linear(12, 8)
            self.text_head.weight = self.head.weight
            self.gain = nn.Parameter(torch.tensor(1.5))
            self.row = nn.Parameter(torch.randn(1, 12) * 0.1)
            self.unused = nn.Parameter(torch.ones(2, 2))
            self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def encode_image(self, x: Tensor) -> Tensor:  # [n, 3, 16, 16]
        x = self.stem(x) * self.gain
        for block in self.image_blocks:
            x = block(x)
        return self.head(x)

    def encode_text(self, tokens: Tensor) -> Tensor:  # [n, 24]
        self.lengths.add(tokens.shape[1])
        x = self.tokens(tokens) + self.positional_embedding + self.row
        x = self.attn_mask @ x / self.attn_mask.sum(1, keepdim=True)  # sees what is before it
        x = x[torch.arange(len(x)), tokens.argmax(-1)]  # the end mark
        return self.text_head(self.text_blocks(x))


def model(seed: int) -> BlockEncoder:
    return BlockEncoder(seed).double()


def loader() -> PairLoader:
    """19 pairs in batches of 7, 7 and 5; their order, ids and captions."""
    whole = random_pairs(19, 19)[0]
    texts = [" ".join(map(str, row)) for row in whole["tokens"].tolist()]

    def tokenizer(texts: list[str]) -> Tensor:
        rows = [[int(w) for w in t.split()][:6] for t in texts]  # reworded ones may be shorter
        return torch.tensor([row + [0] * (6 - len(row)) for row in rows], device="cpu")

    pairs = pairs_from_arrays(whole["images"].numpy(), texts)
    return PairLoader(pairs, tokenizer, batch_size=7, seed=2, drop_last=False)


class Shares(list):
    """This rank's part of batches of 8 pairs, as normalised fp64 floats, of which some are NaN."""

    def __init__(self, bad: int | None = None, short: bool = False) -> None:
        ranks, g = Ranks.start(torch.device("cpu")), torch.Generator().manual_seed(0)
        for k, whole in enumerate(random_pairs(48, 8)):
            images = torch.randn(8, 3, 16, 16, generator=g).double()
            if k == bad:
                images[7, 1, 2, 3] = math.nan  # the last rank's
            tokens = whole["tokens"].clamp(max=48)
            if short:  # the later the pair, the longer: the last has no padding
                ends = torch.arange(8) * 3 + 2
                tokens = tokens.repeat(1, 4) * (torch.arange(24) < ends[:, None])
                tokens[torch.arange(8), ends] = 49
            mine = torch.arange(8).tensor_split(ranks.size)[ranks.rank]
            self.append((images[mine], tokens[mine], whole["ids"][mine]))


def hook(stop: int | None, fate: dict[str, int]):
    """Stops after a step; kills, breaks or fails on the last rank after others."""
    left = dict(fate)

    def on_step(k: int, record: dict, model: nn.Module) -> bool:
        last = Ranks().rank == Ranks().size - 1
        if last and left.get("terminate") == k:
            os.kill(os.getpid(), signal.SIGTERM)
        if last and left.get("raise") == k:
            raise OSError("a hook of one rank fails")
        if last and left.get("break") == k:
            del left["break"]
            weight = model.image_blocks[1].up.weight
            with torch.no_grad():
                (weight.to_local() if hasattr(weight, "to_local") else weight)[-1, -1] = math.nan
        return stop == k

    return on_step


def run(
    method: str = "par_clean",
    pairs: str = "loader",
    stop: int | None = None,
    bad: int | None = None,
    fate: dict[str, int] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What a run came to, JSON-ready but for its weights."""
    data = loader() if pairs == "loader" else Shares(bad, pairs == "short")
    options = FIXED | {"steps": 5} | options
    if pairs != "loader":
        options["augment"] = False
    BlockEncoder.lengths.clear()
    ended = None
    try:
        # Every rank starts from weights of its own; the first one's count.
        result = getattr(pybackdoor, method)(
            model(1 + Ranks().rank), data, on_step=hook(stop, fate or {}), **options
        )
    except BaseException as error:
        result, ended = getattr(error, "result", None), f"{type(error).__name__}: {error}"
    if result is None:
        return {"ended": ended, "weights": None}
    return {
        "ended": ended,
        "weights": result.model.state_dict(),
        "lengths": sorted(BlockEncoder.lengths),
        "untrained": [n for n, p in result.model.named_parameters() if not p.requires_grad],
        "kinds": sorted({type(t).__name__ for t in result.model.parameters()}),
        "history": result.history,
        "pairs": result.report["pairs_seen"],
        "faults": result.report["faults"],
        "skipped": result.report["skipped_batches"],
    }


def runs(several: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [run(**options) for options in several]
