"""Score every training pair by how suspicious it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..batches import InputRules, Tokenizer, check_order
from ..data import PairLoader, Pairs
from ..data.ondemand import shown
from ..features import FeatureReader
from ..ubt.fragility import LEAST, SOUGHT
from ..ubt.reading import ImageRows, Reader
from ..ubt.suspects import Suspects
from .metrics import auroc, precision_at, recall_at
from .neighbours import nearest
from .reading import read, read_suspects
from .scores import Method, method_named

K = 16
# Chosen on `checkerboard` alone, planted in 1 % of 20,000 CIFAR-10 pairs, on one small ResNet: DAO
# had an AUROC of 0.96 among 256, 0.92 among 1,024, and 0.52 among all, where such pictures are each
# other's neighbours. Not every model sets them apart so: on the quality matrix's of that attack
# `benchmarks/detect_planted.py --references` may find nothing among 256 either.
REFERENCE = 256
WHOLE = 0  # as a reference: all pairs


@dataclass(frozen=True, eq=False)
class DetectionResult:
    """Scores of N pairs, in their order.

    Attributes:
        scores: [N] float64, higher = more suspicious; NaN for a pair without a usable image.
        ids: [N] int64 of the pairs.
        method: a name in ``METHODS``.
        settings: what the scores depend on; JSON-ready.
        order: [n] int64 rows that have a score, most suspicious first, equal scores by row.
        broken: {row: reason} of the pairs without a score; a source's ledger lists them too.
        truth: [N] bool, the pairs that are known to be poisoned; None when nothing is known.
    """

    scores: np.ndarray
    ids: np.ndarray
    method: str
    settings: dict[str, Any]
    broken: dict[int, str] = field(default_factory=dict)
    truth: np.ndarray | None = None
    order: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        order = np.argsort(-self.scores, kind="stable")  # NaN last
        object.__setattr__(self, "order", order[: int((~np.isnan(self.scores)).sum())])

    def __len__(self) -> int:
        return len(self.scores)

    def top(self, k: int) -> np.ndarray:
        """[k] rows of the most suspicious pairs, worst first; k in [0, n]."""
        if not 0 <= k <= len(self.order):
            raise ValueError(
                f"top: k must be in [0, {len(self.order)}], the pairs with a score, got {k}"
            )
        return self.order[:k]

    def keep(self, *, share: float | None = None, threshold: float | None = None) -> np.ndarray:
        """Rows to keep, ascending; ``pairs.subset(result.keep(share=0.99))`` holds those pairs.

        Pairs without a score are not kept.

        Args:
            share: keep this share in (0, 1] of the pairs with a score, the least suspicious.
            threshold: keep scores of at most this; give one of the two.
        """
        if (share is None) == (threshold is None):
            got = "neither" if share is None else "both"
            raise ValueError(f"keep: give share or threshold, got {got}")
        if share is not None:
            if not 0 < share <= 1:
                raise ValueError(f"keep: share must be in (0, 1], got {share}")
            dropped = len(self.order) - round(share * len(self.order))
            return np.sort(self.order[dropped:])
        if np.isnan(threshold):
            raise ValueError("keep: threshold must be a number, got nan")
        return np.flatnonzero(self.scores <= threshold)

    def measures(self, ks: Sequence[int] | None = None) -> dict[str, Any]:
        """How well the scores find what is known to be planted; JSON-ready.

        Args:
            ks: numbers of most suspicious pairs; default that of the planted ones.
        Returns:
            {"scored", "planted" (with a score), "auroc", "at": [{"k", "precision", "recall"}]}.
        Raises:
            ValueError: no truth was given, or all or none of the scored pairs are planted.
        """
        if self.truth is None:
            raise ValueError("measures: wanted a result with truth, got one without")
        rows = np.sort(self.order)
        scores, truth = self.scores[rows], self.truth[rows]
        area, planted = auroc(scores, truth), int(truth.sum())
        at = [
            {
                "k": int(k),
                "precision": precision_at(scores, truth, k),
                "recall": recall_at(scores, truth, k),
            }
            for k in ([planted] if ks is None else ks)
        ]
        return {"scored": len(rows), "planted": planted, "auroc": area, "at": at}


def detect_samples(
    model: nn.Module,
    pairs: Pairs | PairLoader | Iterable[Any],
    *,
    method: str | None = None,
    k: int | None = None,
    reference: int | None = None,
    seed: int = 0,
    overfit: nn.Module | None = None,
    tokenizer: Tokenizer | None = None,
    truth: np.ndarray | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 256,
    precision: str = "fp32",
    progress: bool | None = None,
) -> DetectionResult:
    """Score each pair that a model was trained on by how likely it is poisoned.

    Scores rank; they do not judge. A clean set has a most suspicious pair too, and poison that a
    method does not see stays unseen.

    Args:
        model: the model that was trained on the pairs, encoded on the device it is on.
        pairs: the training pairs, whole and in their order; a PairLoader stands for its pairs; any
            other iterable of batches, as for ``par_clean``, is read once, in the order it gives;
            for "fragility" its images must be uint8 and are kept. A DataLoader must not shuffle.
        method: a name in ``METHODS``; None: dao where k or reference is given, else as ``suited``
            chooses. dao, slof, lid and k_dist look at images alone; fragility at views of the
            images beside their captions, of one word's pairs, the rest lower and all alike.
        k: neighbours of an image; default 16. Only for the first four. For fragility the pairs
            sought, at least 5, of a word with 2 k pairs; default: as many as stand apart, at least
            64, looked for from 256 on. See ``ubt.fragility``.
        reference: neighbours are sought among this many pairs: the set is cut at random into parts
            of at least that size. 0 = among all. Default 256. Only for the first four. Poison is
            found while a part holds clearly fewer than k such images; more of them, as in a large
            part or among all, are each other's neighbours and look ordinary.
        seed: of the parts.
        overfit: for "gain": the model after a short overfit on the pairs whose cosine is lowest.
        tokenizer: list of strings -> [n, L] tokens; needed for the others when pairs are given.
        truth: [N] bool, the pairs known to be poisoned, to judge the scores by; see ``planted``.
        mean, std: of the pixels; default the model's own.
        batch_size: pairs encoded at a time, when pairs are given.
        precision: "fp32" or "bf16", of the towers.
        progress: show bars; None = on a terminal.
    Returns:
        Scores aligned with the pairs. For fragility the settings also say how many pairs are
        suspicious, "found", by which "word", and the "swing": how clearly they
        are of it and lose it once disturbed (``ubt.fragility.Fragile``).
    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
    """
    check_order(pairs, "pairs")
    if isinstance(pairs, PairLoader):
        tokenizer = pairs.tokenizer if tokenizer is None else tokenizer
        pairs = pairs.pairs
    if method is None:
        method = suited(pairs) if k is reference is None else "dao"
    chosen = method_named(method)
    settings = _settings(method, chosen, k, reference, seed) | {"precision": precision}
    models = _models(method, chosen, model, overfit)
    texts = chosen.takes != "neighbours"
    if texts and tokenizer is None and isinstance(pairs, Pairs):
        raise ValueError(f"tokenizer is needed: {method} compares images with their captions")
    if chosen.takes == "views":
        rules = InputRules.of(model, mean=mean, std=std, tokenizer=tokenizer)
        reader = Reader(model, rules, precision, batch_size)
        suspects = Suspects.of(pairs, rules, progress, "pairs")
        reading = read_suspects(pairs, suspects)
    else:
        given = {"mean": mean, "std": std}
        readers = [
            FeatureReader(
                each, tokenizer, batch_size=batch_size, precision=precision, floats=True,
                **({} if each is not model and InputRules.of(each).mean is not None else given),
            )
            for each in models
        ]  # fmt: skip
        reading = read(readers, pairs, images=not texts, cosines=texts, progress=progress)
    if truth is not None:
        truth = np.asarray(truth)
        if truth.dtype != bool or truth.shape != reading.ids.shape:
            raise ValueError(
                f"truth must be [{len(reading.ids)}] bool, one per pair, got {truth.dtype} "
                f"{list(truth.shape)}"
            )
    scores = np.full(len(reading.ids), np.nan)
    if chosen.takes == "views":
        found = chosen.function(
            reader, ImageRows(reader, suspects), suspects, settings["k"], progress
        )
        scores[reading.rows] = found.scores
        settings |= {"found": found.k, "word": found.word, "swing": found.swing}
    elif reading.images is not None:
        device = next(model.parameters()).device
        scores[reading.rows] = among_neighbours(
            chosen, reading.images.to(device), settings, progress
        )
    else:
        scores[reading.rows] = chosen.function(*reading.cosines)
    return DetectionResult(scores, reading.ids, method, settings, reading.broken, truth)


def suited(pairs: Pairs | Iterable[Any]) -> str:
    """The method for pairs where none is named: fragility where captions repeat, else dao.

    Repeat: at most half of them are different, as those made of class names are. There ``dao`` had
    a hundredth right where ``fragility`` had nine tenths (benchmarks/results/ubt.json); where each
    has its own, ``dao`` is arXiv 2502.01385's. Batches, and pairs too few for fragility's default
    k, are for dao.
    """
    if not isinstance(pairs, Pairs) or len(pairs) < 4 * SOUGHT:
        return "dao"
    seen = np.fromiter(map(hash, pairs.captions), np.int64, len(pairs))
    return "fragility" if 2 * len(np.unique(seen)) <= len(pairs) else "dao"


def _settings(
    name: str, method: Method, k: int | None, reference: int | None, seed: int
) -> dict[str, Any]:
    views = method.takes == "views"
    if method.takes != "neighbours":
        if reference is not None:
            raise ValueError(f"reference is for methods of neighbours, got it with {name!r}")
        if not views and k is not None:
            raise ValueError(f"k is for methods of neighbours and fragility, got it with {name!r}")
        if k is not None and (not _is_integer(k) or k < LEAST):
            raise ValueError(f"k must be an integer of at least {LEAST} for {name}, got {k!r}")
        return {"k": None if k is None else int(k)} if views else {}
    k, reference = K if k is None else k, REFERENCE if reference is None else reference
    if not _is_integer(k) or k < 1:
        raise ValueError(f"k must be an integer of at least 1 for {name}, got {k!r}")
    if not _is_integer(reference):
        raise ValueError(f"reference must be an integer for {name}, got {reference!r}")
    if not _is_integer(seed):
        raise ValueError(f"seed must be an integer for {name}, got {seed!r}")
    if reference != WHOLE and reference <= k:
        raise ValueError(
            f"reference must be 0, for all pairs, or above k = {k}, since an image is no "
            f"neighbour of itself; got {reference}"
        )
    return {"k": int(k), "reference": int(reference), "seed": int(seed)}


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _models(
    name: str, method: Method, model: nn.Module, overfit: nn.Module | None
) -> list[nn.Module]:
    if (method.takes == "two models") != (overfit is not None):
        got = "none" if overfit is None else f"it with {name!r}"
        raise ValueError(f"overfit, the model after a short overfit, is for gain alone, got {got}")
    return [model] if overfit is None else [model, overfit]


def among_neighbours(
    method: Method, features: Tensor, settings: dict[str, Any], progress: bool | None
) -> np.ndarray:
    """[n] scores of a method of neighbours, part by part."""
    n, k, reference = len(features), settings["k"], settings["reference"]
    if k >= n:
        raise ValueError(f"k must be below the number of pairs with an image, {n}, got {k}")
    if reference == WHOLE or reference >= n:
        return method.function(nearest(features, k, progress=progress))
    from tqdm import tqdm

    order = np.random.default_rng([settings["seed"], 0x6E656172]).permutation(n)
    scores = np.empty(n)
    parts = np.array_split(order, n // reference)
    for part in tqdm(parts, desc="neighbours", unit="part", disable=not shown(progress)):
        rows = np.sort(part)
        near = nearest(features[torch.from_numpy(rows).to(features.device)], k)
        scores[rows] = method.function(near)
    return scores
