"""When enough is forgotten, and how little of the way there will do."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ..batches import InputRules
from ..distributed import Ranks
from .reading import Reader
from .suspects import Suspects

_FIGURES = ("suspect_cosine", "suspect_recall", "proxy_accuracy")  # of a look
_REASONS = ("steps", "forgotten")  # a checkpoint holds the place
_RECALL = 0.05  # of the held-out suspicious pairs at most so many still find their caption
_ENOUGH = 20  # held-out pairs that tell whether that is so
_KEPT = 0.25  # of max_drop: a run that has lost more recovers by its later, smaller steps
_SAME_CAPTION = 0.9  # cosine of text features from which captions mean the same to the model
_PARTS = 8  # of the way
_ROUNDING = 1e-9  # of a difference of shares


class StoppingRule:
    """Looks every n steps whether enough is forgotten, and at the end how far to go.

    Forgotten: the held-out suspicious pairs' mean cosine with their captions is at most kappa, the
    mean cosine of mismatched pairs before, and for at most 5 % of them the best of R's captions
    means the same as their own: without that a trigger may still win, at a low cosine. A run ends
    where also the proxy of accuracy on some pairs of R is within a quarter of ``max_drop`` of what
    it was, but not before the middle, from which on steps get smaller: large steps cost accuracy
    that the later, smaller ones bring back.
    The proxy is the share of images whose best caption, of those pairs', means the same to the
    model as their own. Captions mean the same whose text features' cosine is at least 0.9. These
    images are mirrored: those that a model was trained on it knows by heart, and of that it loses
    some points first, while accuracy on new images stays; on mirrored ones the two go together.

    Attributes:
        kappa: in [-1, 1].
        checks: one dict per look: step, suspect_cosine, suspect_recall, proxy_accuracy. The first
            is before any step, at -1.
        reason: what ended the run: "forgotten" or "steps".
        ways: what ``settle`` looked at: one dict each: way, in (0, 1], and the same figures.
            The first rank's.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: InputRules,
        suspects: Suspects,
        held_out: np.ndarray,  # [h] rows of D_sus
        retain: tuple[Tensor, Tensor],  # [r, H, W, 3] uint8 and [r, L] tokens
        *,
        every: int = 25,
        max_drop: float = 0.03,
        precision: str = "fp32",
    ) -> None:
        check_looks(every, max_drop)
        self._rules, self._precision = rules, precision
        self._suspects, self._rows, self._retain = suspects, held_out, retain
        self._every, self._max_drop = every, max_drop
        self.reason = "steps"
        image, text = self._features(model)
        self.kappa = mismatched_cosine(image, text)
        self.checks = [{"step": -1, **self._figures(model, image, text)}]
        self.ways: list[dict[str, float]] = []

    def __call__(
        self, step: int, model: nn.Module, may_end: bool = True, last: bool = False
    ) -> bool:
        """Look, if it is time to or the last step; whether the run ends, where it may."""
        due = last or (step + 1) % self._every == 0
        if due and step > self.checks[-1]["step"]:
            found = {"step": step, **self._look(model)}
            self.checks.append(found)
            if may_end and self.forgotten(found) and not self._dear(found, _KEPT):
                self.reason = "forgotten"
        return self.reason != "steps"

    def settle(self, model: nn.Module, before: nn.Module, ranks: Ranks) -> float:
        """Go back as far as what is forgotten stays so; farther, if accuracy has fallen too far.

        Weights on the straight line between the run's start and its end forget less and lose less
        accuracy (the interpolation of WiSE-FT, arXiv 2109.01903). Of its eighths those that cost
        more than ``max_drop`` are passed over. Of the others the farthest is taken, and while that
        is forgotten the next; not so where fewer than 20 pairs are held out, which hardly tell.

        Args:
            model: at the run's end. It is left with the weights taken, on all ranks the first's,
                or, whatever ends this early, with those of the run's end.
            before: the model at the run's start, on the device where the first rank looks.
        Returns:
            the way taken, a share in [0, 1]; 0, the model before, where each costs too much.
        """
        line, home = Line(model, before), next(model.parameters()).device
        try:
            if ranks.rank == 0:
                model.to(next(before.parameters()).device)
                self.ways = self._ways(model, line)
                model.to(home)
            self.ways = ranks.from_first(self.ways)
        except BaseException:
            model.to(home)
            line.go(model, 1.0)
            raise
        way = self.taken()["way"] if self.taken() else 0.0
        line.go(model, way)
        return way

    def taken(self) -> dict[str, float]:
        """The look at the way that is taken; {} where that is none."""
        affordable = [look for look in self.ways if not self._dear(look)]
        forgotten = [look for look in affordable if self.forgotten(look)]
        return (forgotten[-1:] or affordable[:1] or [{}])[0]

    def remark(self) -> str | None:
        """What to tell of a run that has forgotten too little."""
        taken, most = self.taken(), f"max_drop = {self._max_drop:g}"
        if not taken:
            return (
                f"accuracy fell by more than {most} at every eighth of the way, so nothing is "
                "forgotten, the model is as it was given: lower lr and lr_start, or give clean "
                "pairs as retain_loader"
            )
        if taken["suspect_recall"] <= _RECALL:
            return None
        found = (
            f"{100 * taken['suspect_recall']:.0f} % of the suspicious pairs that were held out "
            "still find their own caption"
        )
        if taken["way"] == 1:
            return f"{found}: give more steps, or raise lr and lr_start"
        return (
            f"{found} at {taken['way']:g} of the way, the most that {most} allows: lower lr and "
            "lr_start, give clean pairs as retain_loader, or raise max_drop"
        )

    def _ways(self, model: nn.Module, line: Line) -> list[dict[str, float]]:
        """Looks from the end on, until one is not forgotten that could be taken."""
        looks: list[dict[str, float]] = []
        for part in range(_PARTS, 0, -1):
            line.go(model, part / _PARTS)
            looks.append({"way": part / _PARTS, **self._look(model)})
            unclear = len(self._rows) < _ENOUGH or not self.forgotten(looks[-1])
            if unclear and not self._dear(looks[-1]):
                break
        return looks

    def _dear(self, found: Mapping[str, float], share: float = 1.0) -> bool:
        """Whether a look has lost more accuracy than a share of what may be lost."""
        lost = self.checks[0]["proxy_accuracy"] - found["proxy_accuracy"]
        return lost > share * self._max_drop + _ROUNDING

    def forgotten(self, found: Mapping[str, float]) -> bool:
        """Whether the figures of a look say so."""
        return found["suspect_cosine"] <= self.kappa and found["suspect_recall"] <= _RECALL

    def state(self) -> dict[str, Tensor]:
        """All that the looks have left, for a run that goes on from here."""
        looks = [[float(value) for value in look.values()] for look in self.checks]
        return {
            "looks": torch.tensor(looks, dtype=torch.float64, device="cpu"),
            "reason": torch.tensor(_REASONS.index(self.reason), device="cpu"),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        looks = [dict(zip(("step", *_FIGURES), x, strict=True)) for x in state["looks"].tolist()]
        self.checks = [{**look, "step": int(look["step"])} for look in looks]
        self.reason = _REASONS[int(state["reason"])]

    def _look(self, model: nn.Module) -> dict[str, float]:
        return self._figures(model, *self._features(model))

    def _figures(self, model: nn.Module, image: Tensor, text: Tensor) -> dict[str, float]:
        reader = Reader(model, self._rules, self._precision)
        suspect = reader.images(self._suspects, self._rows)
        captions = reader.tokens(self._suspects.tokens(self._rows))
        figures = (
            float((suspect * captions).sum(-1).double().mean()),
            same_meaning(suspect, captions, text), same_meaning(image, text, text),
        )  # fmt: skip
        return dict(zip(_FIGURES, figures, strict=True))

    def _features(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        reader = Reader(model, self._rules, self._precision)
        return reader.pixels(self._retain[0], mirrored), reader.tokens(self._retain[1])


def check_looks(every: int, max_drop: float) -> None:
    """Refuse options of the stopping rule that are none."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"check_every must be a whole number of steps, at least 1, got {every!r}")
    if not isinstance(max_drop, int | float) or not 0 <= max_drop <= 1:
        raise ValueError(f"max_drop must be a share in [0, 1], got {max_drop!r}")


class Line:
    """From a model's weights before to those it has now: parameters and buffers that differ."""

    def __init__(self, model: nn.Module, before: nn.Module) -> None:
        start = _tensors(before)
        self._ends = {
            name: (start[name].detach().to(there), there.detach().clone())
            for name, there in _tensors(model).items()
            if not torch.equal(start[name].to(there), there)
        }

    @torch.no_grad()
    def go(self, model: nn.Module, share: float) -> None:
        """Set the weights; what is no float to that before at 0, else to that after."""
        there = _tensors(model)
        for name, (before, after) in self._ends.items():
            between = after.is_floating_point() and 0 < share < 1
            value = before.lerp(after, share) if between else after if share else before
            there[name].copy_(value)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def mirrored(x: Tensor) -> Tensor:  # [n, 3, H, W]
    return x.flip(3)


def mismatched_cosine(image: Tensor, text: Tensor) -> float:  # [r, D] unit rows each
    """kappa: mean cosine of an image with the captions that mean something else than its own.

    Raises:
        ValueError: all captions mean the same to the model.
    """
    other = (text @ text.T) < _SAME_CAPTION
    if not other.any():
        raise ValueError(
            f"the captions of the {len(text)} pairs of R that accuracy is judged by all mean the "
            "same to the model: wanted different ones, in retain_loader or, without it, in more "
            "pairs of suspect_loader"
        )
    return float((image @ text.T).double()[other].mean())


def same_meaning(
    image: Tensor,  # [r, D] unit rows
    own: Tensor,  # [r, D] unit rows, the images' captions
    text: Tensor,  # [t, D] unit rows, captions to choose from
) -> float:
    """Share of images whose best caption of ``text`` means the same to the model as their own."""
    best = (image @ text.T).argmax(1)
    return float(((text[best] * own).sum(-1) >= _SAME_CAPTION).double().mean())
