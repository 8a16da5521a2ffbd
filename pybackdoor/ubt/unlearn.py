"""Stage E: forget the suspicious words on the suspicious images, and keep all else.

    L = α L_tok + β L_CLIP(R) + γ (S_φ + S_ψ on R)

L_tok is the mean of -log(1 - p) over the portions t̂ of m suspicious captions, in both directions of
CLIP's loss: p is the probability of the portion's own image among itself and the images of R, and
that of the image's own portion among itself and the captions of R. Other suspicious pairs are left
out of that comparison, and those of R whose captions hold the words to be forgotten: next to them p
is small although nothing is forgotten. S is the mean squared distance to the model before, here a
penalty.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..batches import InputRules, model_input, read_batch
from ..data._keyed import permutation
from ..distributed import Ranks
from ..engine import Captions, Given, Objective, Preparation
from ..ops import contrastive_par
from .reading import Reader
from .suspects import Suspects
from .weak import one_of

FORGETS = ("contrastive", "hinge")
_LOOK = ("step", "suspect_cosine", "suspect_recall", "proxy_accuracy")
_REASONS = ("steps", "forgotten", "accuracy")
_RECALL = 0.05
_KEPT = 0.25  # of max_drop: a run that has lost more recovers by its later, smaller steps
_SAME_CAPTION = 0.9  # cosine of text features from which captions mean the same to the model
_STREAM = 0x666F7267


@dataclass(frozen=True)
class Portions:
    """What is to be forgotten: k suspicious images and what their captions' kept words are.

    Attributes:
        images: [k, H, W, 3] uint8, whole or their kept cells alone, x̂.
        tokens: [k, L] int64, t̂.
        ids: [k] int64.
    """

    images: Tensor
    tokens: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.images)


class LocalUnlearning(Objective):
    """The loss above; the engine's loader is R, and a keyed sample of the portions joins its batch.

    Args:
        before: the frozen model whose features R's must stay close to.
        portions: at least one.
        forgotten: (tokens [n, L]) -> [n] bool, the captions that hold a word to be forgotten.
        sample: portions a step, over all ranks.
        alpha, beta, gamma: weights, beta above 0.
        forget: "contrastive" is L_tok; "hinge" is mean max(0, cos(φ_o, ψ_m) - margin).
        margin: of the hinge.
        stop: asked every so many steps; see ``StoppingRule``.
        seed: of the sample.
    """

    def __init__(
        self,
        before: nn.Module,
        portions: Portions,
        forgotten: Any,
        *,
        sample: int,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        forget: str = "contrastive",
        margin: float = 0.0,
        stop: StoppingRule | None = None,
        precision: str = "auto",
        seed: int = 0,
    ) -> None:
        check_weights(alpha, beta, gamma, forget)
        self._before, self._portions, self._forgotten = before, portions, forgotten
        self._sample = min(sample, len(portions))
        self._alpha, self._beta, self._gamma = alpha, beta, gamma
        self._forget, self._margin, self._stop = forget, margin, stop
        self._precision, self._seed = precision, seed

    def prepare(self, run: Preparation) -> None:
        self._reference = run.frozen(self._before)
        self._model, self._ranks, self._steps = run.model, run.ranks or Ranks(), run.steps
        if self._sample < self._ranks.size:
            raise ValueError(
                f"forget_batch must be at least one pair for each of {self._ranks.size} ranks, got "
                f"{self._sample}"
            )

    def _chosen(self, step: int) -> np.ndarray:
        """This rank's share of the step's portions: all in turn, in an order of (seed, round)."""
        k, m = len(self._portions), self._sample
        places = np.arange(step * m, (step + 1) * m)
        orders = {r: permutation(self._seed ^ _STREAM, r, k) for r in set((places // k).tolist())}
        rows = np.array([orders[p // k][p % k] for p in places])
        return np.array_split(rows, self._ranks.size)[self._ranks.rank]

    def inputs(self, given: Given) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(self._chosen(given.step))
        held = self._portions
        x = given.images()
        more = given.images(held.images[rows], held.ids[rows])
        tokens = (given.batch.tokens.cpu(), held.tokens[rows])
        return torch.cat([x, more]), torch.cat(_as_long(tokens))

    def reference(self, x: Tensor, tokens: Tensor | Captions, given: Given) -> tuple[Tensor, ...]:
        if self._gamma == 0:
            return ()
        n = len(given.batch)
        return self._reference.image(x[:n]), self._reference.text(tokens[:n], given.numbers)

    def __call__(
        self,
        image: Tensor,  # [n + m, D] unit rows: R's, then the portions' own
        text: Tensor,  # [n + m, D] unit rows
        scale: Tensor,  # []
        reference: tuple[Tensor, ...],  # () or image and text features of R before, [n, D]
        given: Given,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        n = len(given.batch)
        options = {"normalize": False, "precision": self._precision}
        keep, recover, s_image, s_text, *_ = contrastive_par(
            text[:n], image[:n], scale, counts=given.counts,
            image_ref=reference[0] if reference else None,
            text_ref=reference[1] if reference else None,
            distance_weight=-self._gamma / self._beta, tau=math.inf, **options,
        )  # fmt: skip
        forget = (self._contrastive if self._forget == "contrastive" else self._hinge)(
            image, text, scale, given, options
        )
        terms = {"contrastive": recover, "forget": forget}
        if reference:
            terms |= {"s_image": s_image, "s_text": s_text}
        return self._alpha * forget + self._beta * keep, terms

    def _contrastive(
        self, image: Tensor, text: Tensor, scale: Tensor, given: Given, options: dict[str, Any]
    ) -> Tensor:
        n = len(given.batch)
        m = len(image) - n
        owner = torch.arange(n, n + m, device=image.device)
        wide = torch.promote_types(image.dtype, torch.float32)
        weight = torch.full((m,), -1 / self._sample, dtype=wide, device=image.device)
        suspect = torch.ones(n + m, dtype=torch.bool)
        suspect[:n] = self._forgotten(given.batch.tokens.cpu())
        counts = None
        if given.counts:
            shares = [len(s) for s in np.array_split(np.arange(self._sample), len(given.counts))]
            counts = [a + b for a, b in zip(given.counts, shares, strict=True)]
        fixed = {
            "owner": owner, "weight": weight, "counts": counts,
            "suspect": suspect.to(image.device, non_blocking=True), **options,
        }  # fmt: skip
        of_text = contrastive_par(text[n:], image, scale, **fixed).loss
        of_image = contrastive_par(image[n:], text, scale, **fixed).loss
        return (of_text + of_image) / 2

    def _hinge(
        self, image: Tensor, text: Tensor, scale: Tensor, given: Given, options: dict[str, Any]
    ) -> Tensor:
        n = len(given.batch)
        cosine = (image[n:] * text[n:]).sum(-1)
        return Ranks().whole((cosine - self._margin).clamp(min=0).sum() / self._sample)

    def enough(self, step: int) -> bool:
        if self._stop is None:
            return False
        may_end, last = step >= self._steps // 2, step + 1 == self._steps
        return self._stop(step, self._model, may_end, last)

    def state(self) -> dict[str, Tensor]:
        return {} if self._stop is None else self._stop.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        if self._stop is not None:
            self._stop.load(state)


def check_weights(alpha: float, beta: float, gamma: float, forget: str) -> None:
    """Refuse weights of terms that are none, and unknown forms of the forget term."""
    one_of("forget", forget, FORGETS)
    for name, value in (("alpha", alpha), ("gamma", gamma)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0, got {value}")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be above 0, the weight that keeps the model, got {beta}")


def _as_long(parts: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Rows of tokens of one length: shorter ones get their own last token, their padding."""
    length = max(part.shape[1] for part in parts)
    return [
        torch.cat([p, p[:, -1:].expand(-1, length - p.shape[1])], 1) if p.shape[1] < length else p
        for p in parts
    ]


class StoppingRule:
    """Looks every n steps whether enough is forgotten, or too much.

    Forgotten: the held-out suspicious pairs' mean cosine with their captions is at most kappa, the
    mean cosine of mismatched pairs before, and for at most 5 % of them the best of R's captions
    means the same as their own: without that a trigger may still win, at a low cosine; and the
    proxy of accuracy on some pairs of R is within a quarter of ``max_drop`` of what it was. Too
    much: it is lower by more than ``max_drop``. Large steps cost accuracy that the later, smaller
    ones bring back: a run goes on all the same, and does not end before the middle, from which on
    steps get smaller; one that ends with too little accuracy goes back to the weights of the last
    look at which there was enough.
    The proxy is the share of images whose best caption, of those pairs', means the same to the
    model as their own. Captions mean the same whose text features' cosine is at least 0.9. These
    images are mirrored: those that a model was trained on it knows by heart, and of that it loses
    some points first, while accuracy on new images stays; on mirrored ones the two go together.

    Attributes:
        kappa: in [-1, 1].
        checks: one dict per look: step, suspect_cosine, suspect_recall, proxy_accuracy. The first
            is before any step, at -1.
        reason: what ended the run: "forgotten", "steps", or, where weights of an earlier look are
            taken, "accuracy".
        good: weights of the last look within ``max_drop``.
        bad: whether the last look was not.
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
        self.reason, self.good, self.bad = "steps", _weights(model), False
        self.checks: list[dict[str, float]] = []
        image, text = self._features(model)
        self.kappa = mismatched_cosine(image, text)
        self._look(-1, model, image, text)

    def __call__(
        self, step: int, model: nn.Module, may_end: bool = True, last: bool = False
    ) -> bool:
        """Look, if it is time to or the last step; whether the run ends, where it may."""
        due = last or (step + 1) % self._every == 0
        if not due or step <= self.checks[-1]["step"]:
            return self.reason != "steps"
        found = self._look(step, model, *self._features(model))
        drop = self.checks[0]["proxy_accuracy"] - found["proxy_accuracy"]
        self.bad = drop > self._max_drop
        if not self.bad:
            self.good = _weights(model)
            gone = found["suspect_cosine"] <= self.kappa and found["suspect_recall"] <= _RECALL
            if may_end and gone and drop <= _KEPT * self._max_drop:
                self.reason = "forgotten"
        return self.reason != "steps"

    def state(self) -> dict[str, Tensor]:
        """All that the looks have left, for a run that goes on from here."""
        looks = [[float(look[name]) for name in _LOOK] for look in self.checks]
        return {
            "looks": torch.tensor(looks, dtype=torch.float64),
            "bad": torch.tensor(self.bad),
            "reason": torch.tensor(_REASONS.index(self.reason)),
            **{f"good/{name}": tensor for name, tensor in self.good.items()},
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        looks = [dict(zip(_LOOK, look, strict=True)) for look in state["looks"].tolist()]
        self.checks = [{**look, "step": int(look["step"])} for look in looks]
        self.bad, self.reason = bool(state["bad"]), _REASONS[int(state["reason"])]
        good = {name: tensor for name, tensor in state.items() if name.startswith("good/")}
        self.good = {name.removeprefix("good/"): tensor for name, tensor in good.items()}

    def kept(self) -> int:
        """Steps after which ``good`` were the weights; 0 for those before the first."""
        first = self.checks[0]["proxy_accuracy"]
        fit = [c for c in self.checks if first - c["proxy_accuracy"] <= self._max_drop]
        return fit[-1]["step"] + 1

    def settle(self, model: nn.Module, bad: bool) -> None:
        """At the end of a run: back to the last good look, where the last one was bad."""
        if bad:
            self.reason = "accuracy"
            model.load_state_dict(self.good)

    def _look(self, step: int, model: nn.Module, image: Tensor, text: Tensor) -> dict[str, float]:
        reader = Reader(model, self._rules, self._precision)
        suspect = reader.images(self._suspects, self._rows)
        captions = reader.tokens(self._suspects.tokens(self._rows))
        figures = (
            step, float((suspect * captions).sum(-1).double().mean()),
            same_meaning(suspect, captions, text), same_meaning(image, text, text),
        )  # fmt: skip
        found = dict(zip(_LOOK, figures, strict=True))
        self.checks.append(found)
        return found

    def _features(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        reader = Reader(model, self._rules, self._precision)
        return reader.pixels(self._retain[0], mirrored), reader.tokens(self._retain[1])


def mirrored(x: Tensor) -> Tensor:  # [n, 3, H, W]
    return x.flip(3)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


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


def freeze_text(model: nn.Module, images: Tensor, rules: InputRules) -> None:
    """Freeze all parameters that the image tower does not use; what both towers share is not.

    Args:
        images: any, as a loader yields them.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    device = trained[0].device
    x = model_input(
        images[:2], rules, device=device, dtype=trained[0].dtype, ids=torch.arange(len(images[:2]))
    )
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.enable_grad():
            out = model.encode_image(x)
            used = torch.autograd.grad(out.float().sum(), trained, allow_unused=True)
    finally:
        for module, training in modes:
            module.training = training
    for p, grad in zip(trained, used, strict=True):
        p.requires_grad_(grad is not None)


def some_pairs(loader: Iterable[Any], rules: InputRules, count: int) -> tuple[Tensor, Tensor]:
    """([n, ...] images, [n, L] tokens): the first pairs that a loader yields, at most ``count``."""
    images, tokens, n = [], [], 0
    for raw in loader:
        batch = read_batch(raw, rules, first=not n)
        images.append(batch.images[: count - n])
        tokens.append(batch.tokens[: count - n])
        n += len(images[-1])
        if n == count:
            break
    if n < 2:
        raise ValueError(f"retain_loader must yield at least 2 pairs, got {n}")
    return torch.cat(images), torch.cat(tokens)
