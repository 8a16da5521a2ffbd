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

from .._native import sent
from ..batches import InputRules, model_input, read_batch
from ..data._keyed import permutation
from ..distributed import Ranks
from ..engine import Captions, Given, Objective, Preparation
from ..engine.again import standing
from ..ops import contrastive_par
from .stopping import StoppingRule
from .weak import one_of

FORGETS = ("contrastive", "hinge")
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
        suspect = torch.ones(n + m, dtype=torch.bool, device="cpu")
        suspect[:n] = self._forgotten(given.batch.tokens.cpu())
        counts = None
        if given.counts:
            shares = [len(s) for s in np.array_split(np.arange(self._sample), len(given.counts))]
            counts = [a + b for a, b in zip(given.counts, shares, strict=True)]
        fixed = {
            "owner": owner, "weight": weight, "counts": counts,
            "suspect": sent(suspect, image.device), **options,
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


def freeze_text(model: nn.Module, images: Tensor, rules: InputRules) -> None:
    """Freeze all parameters that the image tower does not use; what both towers share is not.

    Args:
        images: any, as a loader yields them.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    device = trained[0].device
    images = images[:2]
    ids = torch.arange(len(images), device=device)
    x = model_input(images, rules, device=device, dtype=trained[0].dtype, ids=ids)
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


def some_pairs(
    loader: Iterable[Any], rules: InputRules, count: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """([n, ...] images, [n, L] tokens): the first pairs that a loader yields, at most ``count``.

    The loader stands where it stood; one that shuffles by torch's generator does it by ``seed``.
    """
    images, tokens, n = [], [], 0
    with standing(loader) as walked, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for raw in walked:
            batch = read_batch(raw, rules, first=not n)
            images.append(batch.images[: count - n])
            tokens.append(batch.tokens[: count - n])
            n += len(images[-1])
            if n == count:
                break
    if n < 2:
        raise ValueError(f"retain_loader must yield at least 2 pairs, got {n}")
    return torch.cat(images), torch.cat(tokens)
