"""Invert and recover: find triggers on the model as it is, and train against them.

Every few dozen steps, universal triggers are inverted on the current model (``triggers.invert``):
patterns that make images embed alike, one under a small mask, one over the whole image at a low
opacity. A pool keeps the latest. At every step part of the batch carries one of them each, paired
with its own true captions, so that the model learns to see past whatever it now reacts to, a
planted trigger included. Neither the trigger nor its target is known. The loss is CLIP's own, with
or without PAR's distance term. This is a method of this project, without a publication behind it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .._native import sent
from ..clean import CleanOptions, CleanResult, clean, frozen_copy
from ..engine import Captions, Contrastive, Given, Objective, Preparation, Settings, loss_precision
from ..triggers.invert import FAMILIES, Inverted, invert
from .par import PerturbAndRecover, check_tau

_TAU = 2.15  # PAR's own; where perturb is off, any other is refused
_NONE = "none"  # the state of a pool in which no trigger is yet
_DRAWS = 0x51ED2701  # keeps these draws apart from those of the order and the augmentation


class InvertAndRecover(Objective):
    """Another objective, on batches of which part carries inverted triggers.

    Args:
        inner: the loss.
        every: steps between two inversions of each family; one is left out, on all ranks, where a
            rank has a single image.
        share: of a batch that carries a trigger.
        pool: triggers kept of each family, the latest.
        how: options of ``invert``.
    """

    def __init__(
        self,
        inner: Objective,
        every: int,
        share: float,
        pool: int,
        families: Sequence[str],
        how: Mapping[str, Any],
    ) -> None:
        self._inner, self._every, self._share, self._pool = inner, every, share, pool
        self._families, self._how = tuple(families), how
        self._found: dict[str, Inverted] = {}
        self._told: dict[str, Tensor] = {}
        # Of the latest inversion: its step, and both of the above before it.
        self._last: tuple[int, dict[str, Inverted], dict[str, Tensor]] | None = None

    def prepare(self, run: Preparation) -> None:
        self._run = run
        self._inner.prepare(run)

    def inputs(self, given: Given) -> tuple[Tensor, Tensor]:
        if given.step % self._every == 0:
            if self._last is not None and self._last[0] >= given.step:  # its batch was left out
                self._found, self._told = dict(self._last[1]), dict(self._last[2])
            if given.counts is not None and min(given.counts) < 2:
                self._tell(given.step)
            else:
                with self._run.patient():
                    self._invert(given)
        if not self._found:
            return given.images(), given.batch.tokens
        pool = [self._found[family] for family in self._families]
        found = Inverted(
            torch.cat([one.pattern for one in pool]), torch.cat([one.mask for one in pool])
        )
        generator = torch.Generator().manual_seed(self._seed(given, _DRAWS))
        n = len(given.ids)
        drawn = {"generator": generator, "device": "cpu"}
        which = torch.randint(len(found.mask), (n,), dtype=torch.int32, **drawn)
        which[torch.rand(n, **drawn) >= self._share] = -1
        trigger = {"triggers": found.table(), "trigger_id": which}
        return given.images(trigger=trigger), given.batch.tokens

    def reference(self, x: Tensor, tokens: Tensor | Captions, given: Given) -> tuple[Tensor, ...]:
        return self._inner.reference(x, tokens, given)

    def __call__(
        self,
        image: Tensor,  # [n, D] unit rows
        text: Tensor,  # [n, D] unit rows
        scale: Tensor,  # []
        reference: tuple[Tensor, ...],
        given: Given,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, terms = self._inner(image, text, scale, reference, given)
        return loss, {**terms, **self._told}

    def state(self) -> dict[str, Tensor]:
        if not self._found:  # an empty state would not be loaded
            return {_NONE: torch.zeros((), device="cpu")}
        return {
            f"{family}/{name}": getattr(found, name)
            for family, found in self._found.items()
            for name in ("pattern", "mask")
        } | {f"told/{name}": value for name, value in self._told.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._last = None
        there = {name: tensor.to(self._run.device) for name, tensor in state.items()}
        self._found = {
            family: Inverted(there[f"{family}/pattern"], there[f"{family}/mask"])
            for family in (() if _NONE in there else self._families)
        }
        told = {name: value for name, value in there.items() if name.startswith("told/")}
        self._told = {name.removeprefix("told/"): value for name, value in told.items()}

    def _tell(self, step: int) -> None:
        assert self._run.ranks is not None
        if self._run.ranks.rank == 0:
            warnings.warn(
                f"step {step}: no triggers are inverted, which takes at least 2 images on every "
                f"process, got 1 on one; {self._every} steps later it is tried again",
                UserWarning,
                stacklevel=2,
            )

    def _invert(self, given: Given) -> None:
        """Each rank inverts on its own images; the pool takes them all."""
        run, ranks = self._run, self._run.ranks
        assert run.rules is not None and ranks is not None
        images = sent(given.batch.images, run.device)
        if images.dtype != torch.uint8:
            raise TypeError(f"invert_clean needs uint8 images to stamp, got {images.dtype}")
        self._last = given.step, dict(self._found), dict(self._told)
        modes = [(module, module.training) for module in run.model.modules()]
        run.model.eval()
        try:
            for number, family in enumerate(self._families):
                one, told = invert(
                    lambda x: run.encode.image(run.model, x), images,
                    mean=run.rules.mean, std=run.rules.std, family=family,
                    seed=self._seed(given, number), **self._how,
                )  # fmt: skip
                ones = [1] * ranks.size
                new = [ranks.gather(x, ones) for x in (one.pattern, one.mask)]
                if family in self._found:
                    old = self._found[family]
                    new = [torch.cat(both) for both in ((old.pattern, new[0]), (old.mask, new[1]))]
                self._found[family] = Inverted(*(x[-self._pool * ranks.size :] for x in new))
                ranks.sum_(told["cosine"])
                self._told[f"cosine_{family}"] = told["cosine"] / ranks.size
        finally:
            for module, training in modes:
                module.training = training

    def _seed(self, given: Given, kind: int) -> int:
        assert self._run.ranks is not None
        words = (self._run.seed, given.step, kind, self._run.ranks.rank)
        seed = 0
        for word in words:
            seed = (seed * 0x9E3779B97F4A7C15 + word + 1) % 2**63
        return seed


def invert_clean(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    perturb: bool = False,
    tau: float = _TAU,
    every: int = 50,
    share: float = 0.25,
    pool: int = 3,
    families: Sequence[str] = FAMILIES,
    inversion_steps: int = 150,
    inversion_batch: int = 64,
    area_weight: float = 1.0,
    opacity: float = 0.3,
    **options: Unpack[CleanOptions],
) -> CleanResult:
    """Remove a backdoor from a CLIP model by training against triggers inverted on it.

    Args:
        model, loader: as for ``par_clean``; the loader yields uint8 images.
        perturb: whether PAR's distance term, up to tau, is part of the loss, beside CLIP's own.
            Without it no tau may be given.
        every: steps between inversions; each costs inversion_steps forward and backward passes
            of inversion_batch images, for each family. Of several processes, where one has a
            single image, none inverts, with a warning.
        share: of a batch that carries an inverted trigger, in [0, 1].
        pool: triggers kept of each family (and rank), the latest.
        families: of triggers, see ``triggers.invert.invert``, as are the next four.
        options: those of every cleaning method, see ``par_clean``.
    Returns:
        As ``par_clean``; the history has the mean cosine that each family's last inversion reached.
    Raises:
        As ``par_clean``.
    """
    check_tau(tau)
    if tau != _TAU and not perturb:
        raise ValueError(
            f"tau is of the distance term that perturb adds: give both or neither, got tau={tau} "
            "without perturb"
        )
    counts = {
        "every": (every, 1), "pool": (pool, 1), "inversion_steps": (inversion_steps, 1),
        "inversion_batch": (inversion_batch, 2),
    }  # fmt: skip
    for name, (value, least) in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if not 0 <= area_weight < math.inf:
        raise ValueError(f"area_weight must be at least 0 and finite, got {area_weight}")
    if not 0 < opacity <= 1:
        raise ValueError(f"opacity must be in (0, 1], got {opacity}")
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    wrong = [family for family in families if family not in FAMILIES]
    if wrong or not families:
        raise ValueError(f"families must be of {', '.join(FAMILIES)}, got {families!r}")
    how = {
        "steps": inversion_steps, "batch_size": inversion_batch, "area_weight": area_weight,
        "opacity": opacity,
    }  # fmt: skip
    own = {
        "perturb": perturb,
        "tau": tau,
        "every": every,
        "share": share,
        "pool": pool,
        "families": list(families),
    }

    def objective(student: nn.Module, settings: Settings) -> InvertAndRecover:
        precision = loss_precision(settings.precision)
        inner: Objective = Contrastive(precision)
        if perturb:
            inner = PerturbAndRecover(frozen_copy(student), tau, precision)
        return InvertAndRecover(inner, every, share, pool, families, how)

    return clean("invert", model, loader, objective, {**own, **how}, **options)
