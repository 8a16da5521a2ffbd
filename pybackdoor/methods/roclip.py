"""RoCLIP (arXiv 2303.06854) as fine-tuning: images matched with other captions than their own.

In every second epoch each caption's features are replaced by their nearest neighbour in a pool of
earlier captions' features, first in, first out: a poisoned pair is not seen as a pair. The other
epochs are CLIP's own loss on augmented images (AutoAugment) and captions (EDA).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..clean import CleanOptions, CleanResult, clean
from ..data.eda import Synonyms
from ..distributed import Ranks
from ..engine import Contrastive, Given, Preparation, Settings, loss_precision
from ._views import AugmentedViews


class PooledContrastive(Contrastive):
    """CLIP's loss against pooled captions in every ``every``-th epoch.

    The pool holds what all ranks' captions gave, in the order of the steps. The last two steps'
    rows are kept beyond its size: a step that is taken back takes its rows with it.
    """

    def __init__(
        self, views: AugmentedViews, pool_size: int, every: int, precision: str = "auto"
    ) -> None:
        super().__init__(precision)
        self._views, self._size, self._every = views, pool_size, every
        self._rows: Tensor | None = None  # [m, D], oldest first
        # [m], the step that gave each
        self._steps = torch.empty(0, dtype=torch.int64, device="cpu")

    def prepare(self, run: Preparation) -> None:
        self._views.prepare(run)
        self._ranks, self._device = run.ranks or Ranks(), run.device
        least = (self._every - 1) * (len(run.loader) if hasattr(run.loader, "__len__") else 0)
        if least and run.steps <= least:
            raise ValueError(
                f"roclip_clean: the pool is first used after {self._every - 1} epochs of "
                f"{least // (self._every - 1)} steps, got {run.steps} steps in all: raise epochs "
                "or steps, or lower pool_every"
            )

    def inputs(self, given: Given) -> tuple[Tensor, Tensor]:
        if self._pools(given):
            return super().inputs(given)
        return self._views.images(given), self._views.tokens(given)

    def _pools(self, given: Given) -> bool:
        return given.epoch % self._every == self._every - 1

    def __call__(
        self,
        image: Tensor,  # [n, D] unit rows
        text: Tensor,  # [n, D] unit rows
        scale: Tensor,  # []
        reference: tuple[Tensor, ...],
        given: Given,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rows = text.detach()[:0] if self._rows is None else self._rows
        earlier = int((self._steps < given.step).sum())
        pool = rows[:earlier][-self._size :]
        likeness = torch.ones_like(text[:, 0].detach())
        used = text
        if self._pools(given) and len(pool):
            likeness, nearest = (text.detach() @ pool.T).max(1)
            used = pool[nearest]
        counts = given.counts or [len(text)]
        self._push(rows[:earlier], self._ranks.gather(text.detach(), counts), given.step)
        total = likeness.sum()
        self._ranks.sum_(total)
        loss, _ = super().__call__(image, used, scale, reference, given)
        return loss, {"neighbour_cosine": total / sum(counts)}

    def _push(self, rows: Tensor, new: Tensor, step: int) -> None:
        steps = torch.cat([self._steps[: len(rows)], self._steps.new_full((len(new),), step)])
        kept = self._size + int((steps >= step - 1).sum())
        self._rows, self._steps = torch.cat([rows, new])[-kept:], steps[-kept:]

    def state(self) -> dict[str, Tensor]:
        return {} if self._rows is None else {"pool": self._rows, "pool_steps": self._steps}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._rows, self._steps = state["pool"].to(self._device), state["pool_steps"]


def roclip_clean(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    pool_size: int = 2000,
    pool_every: int = 2,
    synonyms: Synonyms | None = None,
    **options: Unpack[CleanOptions],
) -> CleanResult:
    """Fine-tune a CLIP model on clean pairs with RoCLIP's pool of captions.

    RoCLIP is published as a defence while a model is pre-trained on poisoned data (lr 5e-5, 24
    epochs, batches of 512, a pool of 21,845 captions, about 2 % of the pairs). Here it is a
    baseline that starts from a model already poisoned, on clean pairs, with the schedule of every
    method and few epochs: no claim of the paper carries over. Pooled captions are constants, so
    that only the image tower learns in those epochs.

    Args:
        model, loader: as for ``cleanclip_clean``.
        pool_size: captions' features kept; the default is 2 % of 100,000 pairs. A pool that is not
            small against the pairs finds a caption's own features of the epoch before. While fewer
            have been seen all are used, and with none a caption stands for itself.
        pool_every: epochs ``pool_every``, twice it, ... take the captions from the pool; 1: all do.
        synonyms: of EDA, as for ``cleanclip_clean``.
    Options: those of ``par_clean``, but ``augment`` (PAR's, in the pool's epochs) is False here.
    Returns:
        As ``par_clean``; the history holds neighbour_cosine, the mean cosine of the captions with
        what replaced them, 1 where nothing did.
    Raises:
        TypeError, ValueError, NonFiniteError, RuntimeError, KeyboardInterrupt: as ``par_clean``.
    Source: arXiv 2303.06854, section 4.
    """
    for name, value in (("pool_size", pool_size), ("pool_every", pool_every)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    views = AugmentedViews("roclip_clean", synonyms)

    def objective(student: nn.Module, settings: Settings) -> PooledContrastive:
        return PooledContrastive(views, pool_size, pool_every, loss_precision(settings.precision))

    own = {"pool_size": pool_size, "pool_every": pool_every, "synonyms": views.synonyms}
    options = {"augment": False, **options}
    return clean("roclip", model, loader, objective, own, **options)
