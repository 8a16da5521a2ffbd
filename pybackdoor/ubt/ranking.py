"""The rankings that the most suspicious pairs, D_sus, come from: stages A, B and the start of C."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..batches import InputRules
from .fragility import SOUGHT, fragility
from .overfit import LOSSES, overfit
from .reading import ImageRows, Reader, pair_cosines
from .suspects import Suspects
from .weak import check_pool, one_of, weak_pool

RANKINGS = ("fragility", "gain", "cosine")
GIVEN = "scores"  # of the user's own
# Excess of cohesion that the gate wants of each. By fragility clean models exceed it, too
# (benchmarks/bench_ubt.py --gate-only): it keeps out what is no group at all, the swing judges.
EXCESS = {"fragility": 0.1, "gain": 0.1, "cosine": 0.3, GIVEN: 0.1}
_OVERFIT: dict[str, Any] = {
    "weak_share": 0.05, "tail": "low", "overfit_steps": 200, "overfit_lr": 1e-5,
    "overfit_loss": "contrastive",
}  # fmt: skip


class Ranked(NamedTuple):
    """How suspicious the pairs are.

    Attributes:
        scores: [N], higher = more; NaN: not to be chosen.
        k: how many are.
        swing: see ``fragility.Fragile``; None where the ranking does not say.
        word: that they have in common; None where the ranking does not say.
    """

    scores: np.ndarray
    k: int
    swing: float | None = None
    word: str | None = None

    @property
    def usable(self) -> int:
        """Pairs that can be chosen."""
        return int((~np.isnan(self.scores)).sum())


def overfit_options(ranked_by: str, **options: Any) -> dict[str, Any]:
    """Those of stages A and B, None by their defaults; {} where the ranking goes without them.

    Raises:
        ValueError: one is no such option, or given to a ranking without those stages.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if ranked_by in ("fragility", GIVEN):
        for name in given:
            raise ValueError(f"{name} is for rank 'gain' and 'cosine', got it with {ranked_by!r}")
        return {}
    found = _OVERFIT | given
    one_of("overfit_loss", found["overfit_loss"], LOSSES)
    check_pool(found["weak_share"], found["tail"])
    return found


def ranked(
    by: str,
    model: nn.Module,
    reader: Reader,  # of the model
    image: ImageRows,  # likewise
    suspects: Suspects,
    k: int | None,
    *,
    pool: dict[str, Any],
    rules: InputRules,
    device: torch.device,
    batch_size: int,
    precision: str,
    seed: int,
    progress: bool | None,
) -> Ranked:
    """Rank the suspects by one of ``RANKINGS``.

    Args:
        k: pairs sought; None: by fragility as many as stand apart, else 256.
        pool: ``overfit_options``.
        batch_size, precision, seed: of stage B, the precision of the towers besides.
    """
    if by == "fragility":
        found = fragility(reader, image, suspects, k, progress)
        return Ranked(found.scores, found.k, found.swing, found.word)
    captions = reader.captions(suspects)
    cosines = pair_cosines(image.all(), captions, suspects)
    exposed = overfit(
        model, suspects, weak_pool(cosines, pool["weak_share"], pool["tail"]), rules=rules,
        device=device, steps=pool["overfit_steps"], lr=pool["overfit_lr"],
        loss=pool["overfit_loss"], batch_size=batch_size, precision=precision, seed=seed,
        progress=progress,
    )  # fmt: skip
    after = Reader(exposed, rules, precision)
    score = pair_cosines(after.images(suspects), after.captions(suspects), suspects)
    return Ranked(score - cosines if by == "gain" else score, SOUGHT if k is None else k)
