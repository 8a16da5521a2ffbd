"""What a step minimises, what it is given, and what it may look at before the first one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..batches import Batch, InputRules
from ..distributed import Ranks
from .sharding import shard
from .towers import Captions, Encoder

if TYPE_CHECKING:
    from .known import Known


@dataclass(frozen=True)
class Given:
    """A step's batch: this rank's share of it.

    Attributes:
        step, epoch: from 0.
        ids: [n] int64 on the host, the loader's own or running numbers.
        counts: pairs of each rank; None for one process.
        numbers: [n] int64 of the loader's captions, None where it does not number them.
        make: (images, ids, augmented, trigger) -> [n, 3, H, W] on the device.
    """

    step: int
    epoch: int
    batch: Batch
    ids: Tensor
    counts: list[int] | None = None
    numbers: Tensor | None = None
    make: Callable[..., Tensor] | None = None

    def images(
        self,
        images: Tensor | None = None,  # [m, H, W, 3] or [m, 3, H, W] uint8, or float
        ids: Tensor | None = None,  # [m] int64
        *,
        augmented: bool = True,
        trigger: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """[m, 3, H, W] normalised input of the image tower; default the batch's own images.

        Args:
            ids: keys of what the augmentation draws.
            augmented: with the run's augmentation, where it has one.
            trigger: put on uint8 pixels first: ``trigger_normalize``'s arguments for it.
        """
        assert self.make is not None
        images = self.batch.images if images is None else images
        return self.make(images, self.ids if ids is None else ids, augmented, trigger)


@dataclass(frozen=True)
class Preparation:
    """A run before its first step.

    Attributes:
        model: to be trained, as it is now.
        encode: its towers' features and those of any other model, in the run's precision.
        known: makes a frozen model's features of the whole data, where that pays; None: nowhere.
        loader: the run's own.
        steps: planned.
        patient: a context for what takes the ranks longer than a step.
        sharded: whether model is split over the ranks, and a frozen one will be.
    """

    model: nn.Module
    encode: Encoder
    device: torch.device
    known: Known | None = None
    ranks: Ranks | None = None
    rules: InputRules | None = None
    loader: Iterable[Any] = ()
    steps: int = 0
    seed: int = 0
    patient: Callable[[], AbstractContextManager[None]] = nullcontext
    sharded: bool = False

    def frozen(self, model: nn.Module) -> Frozen:
        if self.sharded:
            shard(model, self.device)
        return Frozen(model, self.encode, self.known)


class Frozen:
    """A frozen model's unit features, without gradients; of the batch in hand, all its rows."""

    def __init__(self, model: nn.Module, encode: Encoder, known: Known | None) -> None:
        self._model, self._encode = model, encode
        self._texts = None if known is None else known.texts(model)
        self._images = None if known is None else known.images(model)

    @torch.no_grad()
    def image(self, x: Tensor) -> Tensor:  # [n, 3, H, W] -> [n, D]
        if self._images is not None:
            return self._images(x)
        return self._encode.image(self._model, x)

    @torch.no_grad()
    def text(self, tokens: Tensor | Captions, numbers: Tensor | None) -> Tensor:  # [n, D]
        if self._texts is None or numbers is None:
            return self._encode.text(self._model, tokens)
        return self._texts(numbers)


class Objective:
    """What a step minimises. A method is an objective and a schedule, and overrides what it needs.

    Order of a step: ``inputs``, the towers, ``reference``, the call, its gradients.

    Attributes:
        shardable: whether ``settings.shard`` may be used: all ranks call the model's towers as
            often as each other, frozen models are those of ``Preparation.frozen``, and no
            parameter or gradient is looked at.
    """

    shardable = False

    def prepare(self, run: Preparation) -> None:
        """Before the first step, and before ``load``; the same on every rank."""

    def inputs(self, given: Given) -> tuple[Tensor, Tensor]:
        """What the towers encode: [r, 3, H, W] on the device and [k, L] tokens on the host."""
        return given.images(), given.batch.tokens

    def reference(self, x: Tensor, tokens: Tensor | Captions, given: Given) -> tuple[Tensor, ...]:
        """Constants that the loss needs, one row of each per pair of this rank; () for none.

        tokens: as ``Encoder.text`` takes them.
        """
        return ()

    def __call__(
        self,
        image: Tensor,  # [r, D] unit rows of this rank
        text: Tensor,  # [k, D] unit rows of this rank
        scale: Tensor,  # [] exp(logit_scale)
        reference: tuple[Tensor, ...],
        given: Given,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the whole batch, and named [] tensors for the history.

        The ranks' gradients, each of its own rows and share of scale, must add up to the whole.
        """
        raise NotImplementedError

    def around(self, gradients: Callable[..., Any]) -> Callable[..., Any]:
        """What computes the gradients in place of ``gradients``, which it may call."""
        return gradients

    def enough(self, step: int) -> bool:
        """Whether the run may end after this step; asked after each, on every rank, and
        before the first step of a resumed run, of the last one taken.

        Looking at a number on the device here makes the step wait for it: every n-th is enough.
        """
        return False

    def state(self) -> dict[str, Tensor]:
        """What a resumed run must be given back, the same on every rank; {} for nothing."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state`` gave, on the CPU."""


def takes_own_rows(objective: Objective) -> bool:
    """Whether its towers encode each batch as it is, so that what is known of its rows holds."""
    return type(objective).inputs is Objective.inputs
