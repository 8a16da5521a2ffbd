"""Drift repair: turn a changed model's embeddings back towards those of the model it came from.

Training moves both towers. Much of that movement is one rotation which they share, and CLIP's
similarities do not change when both towers' embeddings are rotated together. The orthogonal
Procrustes problem (Schönemann, Psychometrika 31, 1966) gives the rotation that undoes most of it:

    R = argmin over RᵀR = 1 of  Σₙ ‖φ(xₙ)R − φ₀(xₙ)‖² + ‖ψ(tₙ)R − ψ₀(tₙ)‖²  =  UVᵀ
    with  USVᵀ = Σₙ φ(xₙ)φ₀(xₙ)ᵀ + ψ(tₙ)ψ₀(tₙ)ᵀ

for unit rows φ, ψ of the model and φ₀, ψ₀ of the reference. R is folded into the last linear map of
both towers, so that stored indexes, linear probes and projectors made with the reference meet the
embeddings that they know. Reflections are allowed: they keep similarities just as well.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .batches import InputRules, Tokenizer, model_input
from .distributed import Ranks
from .engine import DeferredInterrupt, Encoder, TextTrim, copied, pick_device
from .engine.again import has_len, standing
from .engine.feed import Feed, Item
from .engine.interrupts import exception_of
from .engine.watch import Watch
from .models import check_clip, check_finite
from .models.fold import TOWERS, Fold

LEAST_PAIRS, PAIRS_PER_DIM = 4096, 8
_HELD_OUT = 5  # each fifth pair has no part in the fit and says how good it is
_PROBE = 16  # pairs on which the fold is checked
_NO_END = 1 << 40  # batches of a loader without len(): the pairs or the pass end it before


@dataclass(frozen=True)
class RepairResult:
    """A model whose embeddings have been turned, and what that did.

    Attributes:
        model: the rotated copy, in evaluation mode, on the device it was fitted on.
        report: as ``repair_drift`` says; JSON-serialisable.
    """

    model: nn.Module
    report: dict[str, Any]


def repair_drift(
    model: nn.Module,
    reference: nn.Module,
    loader: Iterable[Any],
    *,
    pairs: int | None = None,
    device: str | torch.device | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    tokenizer: Tokenizer | None = None,
) -> RepairResult:
    """Rotate a model's embeddings so that they come as near as possible to a reference's.

    Similarities between the model's images and texts stay as they are, to rounding; so do its
    predictions and its backdoor, if it has one. Every cleaning method ends with this (``repair``);
    the call is for models that were changed otherwise.

    Args:
        model: a CLIP model; stays as it is.
        reference: the model that it came from: as many dimensions, the same tokens and pixels.
        loader: image-caption pairs, as for ``par_clean``; not augmented here. Its epoch and
            position stay as they are. On several ranks each yields its own share.
        pairs: how many to use, at least 2; default max(4096, 8 D), or all in one pass if fewer.
        device: where to encode; default this process's GPU, else the CPU.
        mean, std: of the three channels for pixels in [0, 1]; default the model's own.
        tokenizer: list of strings -> [n, L] tokens, for loaders that yield strings.
    Returns:
        The rotated copy, and a report: done; reason, where it is not done: the rotation would
        bring nothing nearer; pairs used and, of these, held_out from the fit; left_out, with
        embeddings that are not finite; image_before, text_before, image_after, text_after: mean
        squared distance of unit embeddings to the reference's, in [0, 4], of the pairs held out;
        rank: directions of the D that the pairs speak of, the others are turned as little as
        possible; error: distance of a unit embedding to the exactly rotated one, at most; seconds.
    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came; embeddings that
            are not finite; a one-shot iterator; or a model whose towers do not both end in a
            linear map.
    Example:
        >>> mended = repair_drift(tuned, original, loader)  # doctest: +SKIP
        >>> mended.report["image_after"]  # doctest: +SKIP
    """
    if pairs is not None and (isinstance(pairs, bool) or not isinstance(pairs, int) or pairs < 2):
        raise ValueError(f"pairs must be an integer of at least 2, got {pairs!r}")
    for what, given in (("model", model), ("reference", reference)):
        check_clip(given)
        check_finite(given, what=what)
    where = pick_device(device)
    rules = InputRules.of(model, mean=mean, std=std, tokenizer=tokenizer)
    ranks = Ranks.start(where)
    turned, old = (copied(m).to(where).eval() for m in (model, reference))
    for each in (turned, old):
        ranks.same_start(each, where)
    report: dict[str, Any] = {}
    repair_in_place(turned, old, loader, rules, where, report, pairs=pairs)
    return RepairResult(turned, report)


def repair_in_place(
    model: nn.Module,
    reference: nn.Module,
    loader: Iterable[Any],
    rules: InputRules,
    device: torch.device,
    report: dict[str, Any],
    *,
    pairs: int | None = None,
) -> None:
    """``repair_drift`` on a model in evaluation mode, on ``device``, the same on every rank.

    The report is filled in as soon as the model is rotated, before a signal that came meanwhile is
    raised; until then the model is as it was.
    """
    began = time.perf_counter()
    ranks = Ranks.start(device)
    told = ranks.agree([hasattr(loader, "__next__"), has_len(loader)], device)
    if any(one_shot for one_shot, _ in told):
        raise ValueError(
            "the loader is a one-shot iterator, whose pairs cannot be read again: pass a "
            "PairLoader, a DataLoader or a list"
        )
    steps = None if all(known for _, known in told) else _NO_END
    cuda = [device] if device.type == "cuda" else []
    with (
        standing(loader) as walked,
        torch.random.fork_rng(devices=cuda),
        DeferredInterrupt() as interrupt,
    ):
        watch = Watch(ranks)
        feed = Feed(walked, rules, ranks, device, steps=steps, epochs=1, patient=watch.patient)
        fit = _Fit(model, reference, rules, device, ranks, pairs)
        with watch, watch.lost_ranks():
            for item in feed:
                if fit.add(item):
                    break
                watch.step()
                if interrupt.pending:
                    feed.stop(interrupt.pending)
            if feed.signal > 1:
                raise exception_of(feed.signal)
            with watch.patient():
                found = fit.fold()
        found["seconds"] = round(time.perf_counter() - began, 3)
        report.clear()
        report.update(found)
        if ranks.size == 1:
            interrupt.check()


class _Fit:
    """Cross-covariances of the two models' embeddings, and the rotation that follows from them."""

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        rules: InputRules,
        device: torch.device,
        ranks: Ranks,
        pairs: int | None,
    ) -> None:
        self._new, self._old = (_Rows(m, rules, device) for m in (model, reference))
        self._model, self._device, self._ranks = model, device, ranks
        self._pairs, self._seen = pairs, 0
        self._fold: Fold | None = None

    def add(self, item: Item) -> bool:
        """Take in this rank's share of a batch; True where none is wanted any more."""
        ranks = self._ranks
        if max(epoch for (epoch,) in ranks.agree([item.epoch], self._device)) > 0:
            return True  # the first pass is over
        new, old = self._new(item), self._old(item)  # [2, n, D]
        if new.shape[2] != old.shape[2]:
            raise ValueError(
                f"reference must embed in {new.shape[2]} dimensions as the model does, got "
                f"{old.shape[2]}"
            )
        usable = torch.stack([new, old]).isfinite().all(3).all(0).all(0)  # [n]
        start = self._seen + sum(item.counts[: ranks.rank])
        self._seen += sum(item.counts)
        if self._fold is None and not self._begin(item, usable):
            return False
        numbers = start + torch.arange(len(item.batch))
        held_out = (numbers % _HELD_OUT == 0).to(self._device)
        for part, rows in enumerate((usable & ~held_out, usable & held_out)):
            self._sums[part] += new[:, rows].mT @ old[:, rows]
            self._counts[part] += rows.sum()
        return self._seen >= self._wanted

    def _begin(self, item: Item, usable: Tensor) -> bool:  # [n] bool
        """Look at the model with the first pairs that every rank can use; False for none.

        Every rank finds the same, or none goes on.
        """
        counts = self._ranks.agree([int(usable.sum())], self._device)
        if min(count for (count,) in counts) == 0:
            return False
        refusal = None
        rows = usable.nonzero()[:_PROBE, 0]
        try:
            self._fold = Fold(self._model, *(x[rows] for x in self._new.inputs(item)))
        except ValueError as error:
            refusal = error
        self._all_or_none(refusal)
        assert self._fold is not None
        dim = self._fold.dim
        self._wanted = self._pairs or max(LEAST_PAIRS, PAIRS_PER_DIM * dim)
        # [fitted or held out, image or text, D of the model, D of the reference]
        self._sums = torch.zeros(2, 2, dim, dim, dtype=torch.float64, device=self._device)
        self._counts = torch.zeros(2, dtype=torch.float64, device=self._device)
        return True

    def fold(self) -> dict[str, Any]:
        """Rotates the model, where that helps, and reports."""
        ranks, fold = self._ranks, self._fold
        if fold is None:
            raise ValueError("no batch has finite embeddings of the model and the reference")
        ranks.sum_(self._sums)
        ranks.sum_(self._counts)
        fitted, held_out = map(int, self._counts)
        if not (fitted and held_out):
            raise ValueError(
                f"too few pairs with finite embeddings: {fitted} to fit and {held_out} to judge by"
            )
        rotation, rank = nearest_rotation(self._sums[0].sum(0).cpu())
        mine = {"rotation": rotation.to(self._device)}
        rotation = dict(ranks.tensors_from_first(mine, self._device)[1])["rotation"]
        distances = self._distances(rotation)
        found = {
            "pairs": fitted + held_out, "held_out": held_out,
            "left_out": self._seen - fitted - held_out, "rank": rank, **distances,
        }  # fmt: skip
        before, after = (sum(distances[f"{t}_{when}"] for t in TOWERS) for when in _WHEN)
        if after > before - _ROUNDING:
            return {"done": False, "reason": "no rotation brings the embeddings nearer", **found}
        refusal, error = None, 0.0
        try:
            error = fold.rotate_(rotation)
        except ValueError as reason:
            refusal = reason
        self._all_or_none(refusal)
        errors = ranks.agree([error], self._device)
        return {"done": True, **found, "error": max(each for (each,) in errors)}

    def _distances(self, rotation: Tensor) -> dict[str, float]:
        """2 - 2 mean cosine of the pairs held out."""
        crossed, n = self._sums[1], self._counts[1]
        found = {}
        for tower, sums in zip(TOWERS, crossed, strict=True):
            for when, cosines in zip(_WHEN, (sums.trace(), (rotation * sums).sum()), strict=True):
                found[f"{tower}_{when}"] = float(2 - 2 * cosines / n)
        return found

    def _all_or_none(self, refusal: ValueError | None) -> None:
        """Raises on every rank what one of them has to say against it."""
        against = self._ranks.agree([refusal is not None], self._device)
        if refusal is not None:
            raise refusal
        if any(each for (each,) in against):
            if self._fold is not None:
                self._fold.undo()
            raise ValueError("another rank cannot rotate its model; its own error says why")


_ROUNDING = 1e-8  # of squared distances of unit rows in fp32
_WHEN = ("before", "after")


class _Rows:
    """A model's unit embeddings of whole batches."""

    def __init__(self, model: nn.Module, rules: InputRules, device: torch.device) -> None:
        self._model, self._rules, self._device = model, rules, device
        self._encode = Encoder(None, device)
        self._trim = TextTrim(model, wanted=True, grouped=device.type == "cpu")

    def inputs(self, item: Item) -> tuple[Tensor, Tensor]:
        """What the two towers take."""
        dtype = self._encode.input_dtype(self._model)
        x = model_input(
            item.batch.images, self._rules, device=self._device, dtype=dtype, ids=item.ids
        )
        return x, item.batch.tokens.to(self._device)

    @torch.no_grad()
    def __call__(self, item: Item) -> Tensor:
        """[2, n, D] fp64 unit rows: images, texts."""
        x, _ = self.inputs(item)
        tokens = self._trim(item.batch.tokens).to(self._device)
        image, text = self._encode.image(self._model, x), self._encode.text(self._model, tokens)
        return nn.functional.normalize(torch.stack([image, text]).double(), dim=-1)


def nearest_rotation(
    cross: Tensor,  # [D, D] fp64, sum of outer products: model's row x reference's row
) -> tuple[Tensor, int]:
    """([D, D] orthogonal R of the largest tr(Rᵀ cross), rank of cross).

    Where cross says nothing, as with fewer pairs than dimensions, of all such R the one nearest to
    the identity: with U₂ and V₂ the singular vectors of what is null to fp32, R maps the one space
    to the other by the polar factor of U₂ᵀV₂.
    """
    u, s, vh = torch.linalg.svd(cross)
    rank = int((s > s[0] * torch.finfo(torch.float32).eps).sum())
    null_u, null_vh = u[:, rank:], vh[rank:]
    a, _, bh = torch.linalg.svd(null_u.T @ null_vh.T)
    return u[:, :rank] @ vh[:rank] + null_u @ (a @ bh) @ null_vh, rank
