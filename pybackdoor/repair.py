"""Drift repair: turn a changed model's embeddings back towards those of the model it came from.

Training moves both towers. Much of that movement is one rotation which they share, and CLIP's
similarities do not change when both towers' embeddings are rotated together. The rotation that
brings them back best (``rotation``) is folded into the last linear map of both towers, so that
stored images and texts of the reference fit the model's again, and probes and projectors as far as
the rest of the movement allows. Reflections are allowed: they keep similarities just as well.
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
from .engine.casts import without_autocast
from .engine.feed import Feed, Item
from .engine.interrupts import exception_of
from .engine.watch import Watch
from .models import check_clip, check_finite
from .models.fold import Fold
from .models.protocol import scale
from .rotation import Fit, Rows, kept_rotation, nearest_rotation

LEAST_PAIRS, PAIRS_PER_DIM = 4096, 8
_HELD_OUT = 5  # each fifth pair has no part in the fit and says which rotation is taken
# What the search must gain on them: less may be rounding that Adam has blown up, and is not worth
# turning directions that the pairs do not speak of.
_GAIN = 1e-3
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
    """Rotate a model's embeddings so that a reference's fit them again, as far as they can.

    The rotation brings them near to the reference's and keeps what the model finds when stored
    images or texts of the reference stand in for its own (``rotation`` has the objective).
    Similarities between the model's images and texts stay as they are, to rounding; so do its
    predictions and its backdoor, if it has one. Every cleaning method ends with this
    (``repair``); the call is for models that were changed otherwise.

    The rotation goes into weights that are there, so that the model is of the same class and its
    weights have the same names as before, for whatever saves and reads it. So a tower that does not
    end in a linear map, but in a norm, say, or in an activation, is not repaired: here that is an
    error, and a cleaning method warns and leaves its embeddings where the training took them.

    Args:
        model: a CLIP model; stays as it is.
        reference: the model that it came from: as many dimensions, the same tokens and pixels.
        loader: image-caption pairs, as for ``par_clean``; not augmented here. Its epoch and
            position stay as they are. On several ranks each yields its own share.
        pairs: how many to use, at least 2; default max(4096, 8 D), or all in one pass if fewer.
            Their four embeddings are held in memory, a few times over.
        device: where to encode; default this process's GPU, else the CPU.
        mean, std: of the three channels for pixels in [0, 1]; default the model's own.
        tokenizer: list of strings -> [n, L] tokens, for loaders that yield strings.
    Returns:
        The rotated copy, and a report: done; reason, where it is not done: no rotation serves the
        pairs held out better; pairs used and, of these, held_out from the fit; left_out: those
        with embeddings that are not finite, and batches before the first that every rank can use;
        rank: directions of the D that the pairs speak of; of the pairs held out, which chose
        between the nearest rotation and the search's, each with _before and _after: image and
        text, the mean squared distance of unit embeddings to the reference's, in [0, 4], and
        old_images and old_texts, in nats, how far what the reference's images, or its texts, have
        the model choose among captions diverges from its own choice (``rotation.Fit``); error:
        distance of a unit embedding to the exactly rotated one, at most; seconds.
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


@without_autocast()
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
            _stop_if_asked(interrupt, ranks, device)
            with watch.patient():
                found = fit.fold()
        found["seconds"] = round(time.perf_counter() - began, 3)
        report.clear()
        report.update(found)
        _stop_if_asked(interrupt, ranks, device)


def _stop_if_asked(interrupt: DeferredInterrupt, ranks: Ranks, device: torch.device) -> None:
    """Raises on every rank what a signal asked of one of them."""
    asked = max(int(number) for (number,) in ranks.agree([interrupt.pending], device))
    if asked:
        raise exception_of(asked)


class _Fit:
    """Both models' embeddings of the pairs, and the rotation that follows from them."""

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        rules: InputRules,
        device: torch.device,
        ranks: Ranks,
        pairs: int | None,
    ) -> None:
        self._new, self._old = (_Embedder(m, rules, device) for m in (model, reference))
        self._model, self._device, self._ranks = model, device, ranks
        self._pairs, self._seen = pairs, 0
        self._fold: Fold | None = None
        self._kept: list[Tensor] = []  # [n, 4, D]: images and texts of the model, of the reference
        self._numbers: list[Tensor] = []  # [n] of the pairs in the pass over all ranks

    def add(self, item: Item) -> bool:
        """Take in this rank's share of a batch; True where none is wanted any more."""
        ranks = self._ranks
        if max(epoch for (epoch,) in ranks.agree([item.epoch], self._device)) > 0:
            return True  # the first pass is over
        new, old = self._new(item), self._old(item)  # [n, 2, D]
        if new.shape[2] != old.shape[2]:
            raise ValueError(
                f"reference must embed in {new.shape[2]} dimensions as the model does, got "
                f"{old.shape[2]}"
            )
        rows = torch.cat([new, old.to(new.dtype)], 1)
        usable = rows.isfinite().flatten(1).all(1)  # [n]
        start = self._seen + sum(item.counts[: ranks.rank])
        self._seen += sum(item.counts)
        if self._fold is None and not self._begin(item, usable):
            return False
        self._kept.append(rows[usable])
        self._numbers.append((start + torch.arange(len(rows), device=rows.device))[usable])
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
        self._wanted = self._pairs or max(LEAST_PAIRS, PAIRS_PER_DIM * self._fold.dim)
        return True

    def fold(self) -> dict[str, Any]:
        """Rotates the model, where that helps, and reports."""
        ranks, fold = self._ranks, self._fold
        if fold is None:
            raise ValueError("no batch has finite embeddings of the model and the reference")
        rows, held_out = self._gathered()
        parts = [[Rows(*x[:, :2].unbind(1)), Rows(*x[:, 2:].unbind(1))]
                 for x in (rows[~held_out], rows[held_out])]  # fmt: skip
        fitted, judged = (len(new.image) for new, _ in parts)
        if not (fitted and judged):
            raise ValueError(
                f"too few pairs with finite embeddings: {fitted} to fit and {judged} to judge by"
            )
        best = self._best(*parts) if ranks.rank == 0 else None
        before, after, rank = ranks.from_first(best and best[1:])
        mine = {} if best is None else {"rotation": best[0].to(self._device)}
        rotation = dict(ranks.tensors_from_first(mine, self._device)[1])["rotation"]
        found = {
            "pairs": fitted + judged, "held_out": judged,
            "left_out": self._seen - fitted - judged, "rank": rank,
        }  # fmt: skip
        for when, fit in (("before", before), ("after", after)):
            found |= {f"{name}_{when}": value for name, value in zip(TOLD, fit, strict=True)}
        if Fit(*after).objective > Fit(*before).objective - _ROUNDING:
            return {
                "done": False,
                "reason": "no rotation serves the pairs held out better",
                **found,
            }
        refusal, error = None, 0.0
        try:
            error = fold.rotate_(rotation)
        except ValueError as reason:
            refusal = reason
        self._all_or_none(refusal)
        errors = ranks.agree([error], self._device)
        return {"done": True, **found, "error": max(each for (each,) in errors)}

    def _gathered(self) -> tuple[Tensor, Tensor]:
        """([n, 4, D] of all ranks in the order of the pass, [n] bool: held out)."""
        rows, numbers = torch.cat(self._kept), torch.cat(self._numbers)
        counts = [int(count) for (count,) in self._ranks.agree([len(rows)], self._device)]
        numbers = self._ranks.gather(numbers, counts)
        order = numbers.argsort()
        return self._ranks.gather(rows, counts)[order], numbers[order] % _HELD_OUT == 0

    def _best(
        self,
        fit: Sequence[Rows],  # of the model, of the reference
        judge: Sequence[Rows],
    ) -> tuple[Tensor, Fit, Fit, int]:
        """The rotation that serves the pairs held out best, how they fare before it and after.

        With the rank that the nearest one was fitted on. That one stays where the search for a
        better one finds what holds for its own pairs alone, or as good as nothing.
        """
        factor = float(scale(self._model))
        cross = sum(a.double().T @ b.double() for a, b in zip(*fit, strict=True)).cpu()
        nearest, rank = nearest_rotation(cross)
        kept = kept_rotation(*fit, factor, nearest)
        new, old = (Rows(*(x.double().cpu() for x in rows)) for rows in judge)
        before, near, better = (
            Fit.of(rows, old, factor) for rows in (new, new.turned(nearest), new.turned(kept))
        )
        if better.objective < near.objective - _GAIN:
            return kept, before, better, rank
        return nearest, before, near, rank

    def _all_or_none(self, refusal: ValueError | None) -> None:
        """Raises on every rank what one of them has to say against it."""
        against = self._ranks.agree([refusal is not None], self._device)
        if refusal is not None:
            raise refusal
        if any(each for (each,) in against):
            if self._fold is not None:
                self._fold.undo()
            raise ValueError("another rank cannot rotate its model; its own error says why")


_ROUNDING = 1e-8  # of the squared distances of unit rows in fp32
TOLD = Fit._fields  # figures of a report, each before and after


class _Embedder:
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
        """[n, 2, D] unit rows, images and texts, in fp32 or what the model has beyond it."""
        x, _ = self.inputs(item)
        tokens = self._trim(item.batch.tokens).to(self._device)
        with self._encode.products(self._model):
            image, text = self._encode.image(self._model, x), self._encode.text(self._model, tokens)
        rows = torch.stack([image, text], 1)
        return nn.functional.normalize(
            rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1
        )
