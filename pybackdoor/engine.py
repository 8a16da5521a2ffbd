"""The training loop that every method shares: an objective and a schedule make it a method.

One step: read a batch, augment and normalise it on the device, encode it with the model, gather the
features of all ranks, form the objective, back-propagate, check, step the optimiser. Nothing is
stepped that is not finite, and an interrupted run keeps the state it has reached.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .batches import Batch, InputRules, model_input, read_batch
from .distributed import Ranks
from .models import (
    check_clip,
    check_finite,
    image_features,
    logit_scale_parameters,
    scale,
    text_features,
)
from .ops import Augment

MAX_LOGIT_SCALE = math.log(100.0)  # CLIP's own bound on the learned temperature
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "amp_bf16": torch.bfloat16}
_NO_DECAY_NAMES = ("bias", "ln", "bn")

Schedule = Callable[[int, int], float]  # (step, steps) -> learning rate
StepHook = Callable[[int, dict[str, float], nn.Module], bool | None]


class Objective(Protocol):
    """What a step minimises. A method is an objective and a schedule."""

    def reference(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """Constant features of this rank's rows that the loss needs, each [n, D]; may be ()."""

    def __call__(
        self,
        image: Tensor,  # [N, D] unit rows of all ranks
        text: Tensor,  # [N, D] unit rows of all ranks
        scale: Tensor,  # [] exp(logit_scale)
        reference: tuple[Tensor, ...],  # the gathered constants
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and named [] tensors for the history."""


@dataclass(frozen=True)
class Settings:
    """How a model is trained, whatever for.

    Attributes:
        steps: optimiser steps in all; None for epochs * len(loader).
        epochs: passes over the loader when steps is None.
        weight_decay: for parameters of two or more dimensions whose name has no bias, ln or bn.
        betas: of AdamW.
        augment: PAR's noise and erasing, or None.
        precision: "fp32", or "bf16" for autocast with fp32 losses.
        seed: of augmentation and dropout.
        freeze_scale: leave logit_scale alone; else it is trained and kept at or below ln 100.
        freeze_batchnorm: batch norm uses its running statistics and leaves them alone.
        progress: show a progress bar; None when standard error is a terminal.
    """

    steps: int | None = None
    epochs: int = 1
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.98)
    augment: Augment | None = None
    precision: str = "bf16"
    seed: int = 0
    freeze_scale: bool = True
    freeze_batchnorm: bool = True
    progress: bool | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {list(PRECISIONS)}, got {self.precision!r}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")


@dataclass
class TrainLog:
    """What a run did: one dict per step, and the batches it could not use."""

    steps: list[dict[str, float]] = field(default_factory=list)
    pairs: int = 0
    skipped_batches: int = 0
    seconds: float = 0.0


class NonFiniteError(RuntimeError):
    """A loss or gradient stopped being finite; the model holds the last good weights."""


class Interrupted(KeyboardInterrupt):
    """Training was interrupted; the model holds the last whole step, ``log`` its history."""

    def __init__(self, log: TrainLog) -> None:
        super().__init__(f"interrupted after {len(log.steps)} steps")
        self.log = log


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, else this rank's GPU, else the CPU."""
    if device is not None:
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def train(
    model: nn.Module,
    loader: Iterable[Any],
    objective: Objective,
    schedule: Schedule,
    settings: Settings,
    *,
    rules: InputRules,
    device: torch.device,
    on_step: StepHook | None = None,
) -> TrainLog:
    """Train ``model`` in place; every rank of a distributed run calls this with its own share.

    Args:
        loader: yields this rank's batches (see ``batches``); walked anew for each epoch, after
            ``set_epoch`` where it has one.
        on_step: called after each step with (step, record, model); returning True ends the run.
    Raises:
        ValueError, TypeError: a batch, the model or a setting cannot be used; before any step
            where that can be known before.
        NonFiniteError: naming the tensor; the model keeps its last good weights.
        Interrupted: on Ctrl-C, once the step in flight is dropped.
    """
    steps = settings.steps or settings.epochs * _length(loader)
    if steps < 1:
        raise ValueError("loader is empty: wanted at least one batch of two pairs, got none")
    ranks = Ranks.start(device)
    model.to(device)
    ranks.same_start(model)
    frozen = logit_scale_parameters(model)
    if settings.freeze_scale:
        for p in frozen:
            p.requires_grad_(False)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        decay_groups(named, settings.weight_decay),
        lr=0.0,
        betas=settings.betas,
        eps=1e-8,
        fused=True,
    )
    set_train_mode(model, settings.freeze_batchnorm)
    encode = Encoder(PRECISIONS[settings.precision], device)
    log = TrainLog()
    started = time.perf_counter()
    bar = _Progress(steps, settings.progress, ranks.rank == 0)
    try:
        with bar, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(settings.seed)
            batches = _batches(loader, rules, ranks, device, log)
            for k in range(steps):
                epoch, batch, counts, ids = next(batches)
                x = model_input(
                    batch,
                    rules,
                    device=device,
                    dtype=encode.input_dtype(model),
                    ids=ids,
                    augment=settings.augment,
                    seed=settings.seed,
                    view=epoch,
                )
                tokens = batch.tokens.to(device, non_blocking=True)
                image = ranks.gather(encode.image(model, x), counts)
                text = ranks.gather(encode.text(model, tokens), counts)
                constants = tuple(ranks.gather(f, counts) for f in objective.reference(x, tokens))
                temperature = scale(model) if settings.freeze_scale else model.logit_scale.exp()
                loss, terms = objective(image, text, temperature, constants)
                record = {"loss": loss.item(), **{n: t.item() for n, t in terms.items()}}
                if not math.isfinite(record["loss"]):
                    raise NonFiniteError(_where_loss_broke(k, record, image, text))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                ranks.sum_gradients(p for _, p in named)
                _check_gradients(k, named)
                record["lr"] = schedule(k, steps)
                for group in optimizer.param_groups:
                    group["lr"] = record["lr"]
                optimizer.step()
                if not settings.freeze_scale:
                    _clamp_scale(frozen)
                log.pairs += sum(counts)
                log.seconds = time.perf_counter() - started
                log.steps.append({"step": k, "epoch": epoch, **record})
                bar.advance(record, log.pairs / log.seconds)
                if on_step is not None and on_step(k, record, model) is True:
                    break
    except KeyboardInterrupt as stop:
        raise Interrupted(log) from stop
    return log


class Encoder:
    """Unit features of both towers, under autocast where the precision asks for it."""

    def __init__(self, autocast: torch.dtype | None, device: torch.device) -> None:
        self._autocast, self._device = autocast, device

    def input_dtype(self, model: nn.Module) -> torch.dtype:
        """What the towers' first layers take: the model's own dtype."""
        return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def image(self, model: nn.Module, x: Tensor) -> Tensor:  # x [n, 3, H, W] normalised
        """[n, D] unit rows in at least fp32."""
        with self._context():
            return image_features(model, x)

    def text(self, model: nn.Module, tokens: Tensor) -> Tensor:  # tokens [n, L]
        """[n, D] unit rows in at least fp32."""
        with self._context():
            return text_features(model, tokens)

    def _context(self) -> torch.autocast:
        enabled = self._autocast is not None
        return torch.autocast(self._device.type, dtype=self._autocast, enabled=enabled)


def decay_groups(named: list[tuple[str, Tensor]], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: no decay for vectors, scalars and names with bias, ln or bn."""
    free = [p for n, p in named if p.ndim < 2 or any(part in n for part in _NO_DECAY_NAMES)]
    kept = {id(p) for p in free}
    decayed = [p for _, p in named if id(p) not in kept]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def set_train_mode(model: nn.Module, freeze_batchnorm: bool) -> None:
    """``train()``, with batch norm left in evaluation mode when its statistics are frozen."""
    model.train()
    if freeze_batchnorm:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be trained: a missing method, or weights that are not finite."""
    check_clip(model)
    check_finite(model)


def _length(loader: Iterable[Any]) -> int:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(
            "steps must be given: the loader has no len(), so epochs cannot be counted"
        ) from None


def _batches(
    loader: Iterable[Any], rules: InputRules, ranks: Ranks, device: torch.device, log: TrainLog
) -> Iterator[tuple[int, Batch, list[int], Tensor]]:
    """(epoch, batch, rows of each rank, ids) for as long as anyone asks."""
    seen, epoch = 0, 0
    while True:
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        used = 0
        for raw in loader:
            batch = read_batch(raw, rules)
            counts = ranks.counts(len(batch), device)
            total = sum(counts)
            if total < 2 or min(counts) < 1:
                if used == 0:
                    raise ValueError(
                        "a batch must hold at least two pairs, and one on every rank, got "
                        f"{counts if ranks.size > 1 else total}: the loss needs negatives"
                    )
                log.skipped_batches += 1
                continue
            first = seen + sum(counts[: ranks.rank])
            ids = batch.ids if batch.ids is not None else torch.arange(first, first + len(batch))
            seen += total
            used += 1
            yield epoch, batch, counts, ids
        if used == 0:
            what = "is empty" if epoch == 0 else f"yields nothing in epoch {epoch + 1}"
            raise ValueError(
                f"loader {what}: wanted batches of at least two pairs, got {seen} pairs so far "
                "(a one-shot iterator cannot be walked again: pass a DataLoader or a list)"
            )
        epoch += 1


def _where_loss_broke(step: int, record: dict[str, float], image: Tensor, text: Tensor) -> str:
    parts = {"image features": image, "text features": text}
    broken = [
        f"{name} of {int((~part.isfinite()).any(-1).sum())} of {len(part)} pairs"
        for name, part in parts.items()
        if not part.isfinite().all()
    ]
    broken = broken or [name for name, value in record.items() if not math.isfinite(value)]
    return f"step {step}: not finite: {', '.join(broken)}; the weights of the step before are kept"


def _check_gradients(step: int, named: list[tuple[str, Tensor]]) -> None:
    grads = [p.grad for _, p in named if p.grad is not None]
    if not grads:
        raise ValueError("the loss reaches no parameter of the model: is everything frozen?")
    if torch.stack(torch._foreach_norm(grads)).isfinite().all():
        return
    broken = [n for n, p in named if p.grad is not None and not p.grad.isfinite().all()]
    if not broken:  # a norm can overflow where no entry does
        return
    raise NonFiniteError(
        f"step {step}: the gradient of {broken[0]} is not finite ({len(broken)} of {len(grads)} "
        "tensors); the weights of the step before are kept"
    )


@torch.no_grad()
def _clamp_scale(parameters: list[nn.Parameter]) -> None:
    for p in parameters:
        p.clamp_(0.0, MAX_LOGIT_SCALE)


class _Progress:
    """A bar with the loss, the method's terms, throughput and time left; silent off a terminal."""

    def __init__(self, steps: int, wanted: bool | None, leader: bool) -> None:
        self._bar = None
        if leader and wanted is not False:
            from tqdm.auto import tqdm

            hidden = None if wanted is None else False  # tqdm: None hides it off a terminal
            self._bar = tqdm(total=steps, disable=hidden, unit="step", dynamic_ncols=True)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, record: dict[str, float], pairs_per_second: float) -> None:
        if self._bar is not None and not self._bar.disable:
            shown = {n: f"{v:.3g}" for n, v in record.items()}
            self._bar.set_postfix({**shown, "pairs/s": f"{pairs_per_second:.0f}"}, refresh=False)
            self._bar.update()
