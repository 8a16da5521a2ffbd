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

_FIGURES = ("suspect_cosine", "suspect_recall", "proxy_accuracy")
_REASONS = ("steps", "forgotten")
RECALL = 0.05
_KEPT = 0.25  # of max_drop: a run that has lost more recovers by its later, smaller steps
_SAME_CAPTION = 0.9  # cosine of text features from which captions mean the same to the model
_PARTS = 8  # of the way


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
        if every < 1:
            raise ValueError(f"check_every must be at least 1 step, got {every}")
        if not 0 <= max_drop <= 1:
            raise ValueError(f"max_drop must be a share in [0, 1], got {max_drop}")
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
            if may_end and self.forgotten(found) and self._lost(found) <= _KEPT * self._max_drop:
                self.reason = "forgotten"
        return self.reason != "steps"

    def settle(self, model: nn.Module, before: Mapping[str, Tensor], ranks: Ranks) -> float:
        """Go back as far as what is forgotten stays so; farther, if accuracy has fallen too far.

        Weights on the straight line between the run's start and its end forget less and lose less
        accuracy (the interpolation of WiSE-FT, arXiv 2109.01903). Of its eighths, from the end on,
        those that cost more than ``max_drop`` are passed over; of the others the first one is
        taken, and while that is forgotten the next.

        Args:
            model: at the run's end; it is left with the weights taken, on all ranks the first's.
            before: its weights at the run's start.
        Returns:
            the way taken, a share in [0, 1]; 0 where each costs too much accuracy.
        """
        after = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        best = 0.0
        for part in range(_PARTS, 0, -1):
            go(model, before, after, part / _PARTS)
            found = {"way": part / _PARTS, **self._look(model)}
            self.ways.append(found)
            if self._lost(found) > self._max_drop:
                continue
            forgotten = self.forgotten(found)
            best = found["way"] if forgotten or not best else best
            if not forgotten:
                break
        best = ranks.from_first(best)
        go(model, before, after, best)
        return best

    def forgotten(self, found: Mapping[str, float]) -> bool:
        """Whether the figures of a look say so."""
        return found["suspect_cosine"] <= self.kappa and found["suspect_recall"] <= RECALL

    def state(self) -> dict[str, Tensor]:
        """All that the looks have left, for a run that goes on from here."""
        looks = [[float(value) for value in look.values()] for look in self.checks]
        return {
            "looks": torch.tensor(looks, dtype=torch.float64),
            "reason": torch.tensor(_REASONS.index(self.reason)),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        looks = [dict(zip(("step", *_FIGURES), x, strict=True)) for x in state["looks"].tolist()]
        self.checks = [{**look, "step": int(look["step"])} for look in looks]
        self.reason = _REASONS[int(state["reason"])]

    def _lost(self, found: Mapping[str, float]) -> float:
        return self.checks[0]["proxy_accuracy"] - found["proxy_accuracy"]

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


def go(
    model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor], way: float
) -> None:
    """Set the weights to those at a share of the way; what is no float to those after."""
    model.load_state_dict({
        name: torch.lerp(before[name].to(there), there, way) if there.is_floating_point() else there
        for name, there in after.items()
    })  # fmt: skip


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
            "retain captions must differ: all held-out ones mean the same to the model"
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
