"""The training loop that every method shares: an objective and a schedule make it a method.

One step: read a batch, augment and normalise it on the device, encode it with the model, form the
objective over all ranks, back-propagate, check, step the optimiser. Nothing is stepped that is not
finite, and an interrupted run keeps the state it has reached.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .batches import InputRules, model_input
from .distributed import Ranks
from .feed import Feed
from .interrupts import DeferredInterrupt
from .models import (
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
        image: Tensor,  # [n, D] unit rows of this rank
        text: Tensor,  # [n, D] unit rows of this rank
        scale: Tensor,  # [] exp(logit_scale)
        reference: tuple[Tensor, ...],  # the constants
        counts: list[int] | None,  # pairs of each rank; None for one process
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the whole batch, and named [] tensors for the history.

        The ranks' gradients, each of its own rows and share of scale, must add up to the whole.
        """


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
        for name, least in (("steps", 1), ("epochs", 1), ("seed", 0)):
            value = getattr(self, name)
            if name == "steps" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if not least <= value < 2**62:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")


@dataclass
class TrainLog:
    """What a run did: one dict per step, how many batches it could not use, and how long it took.

    ``seconds`` leaves out the time spent in a step hook.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    pairs: int = 0
    skipped_batches: int = 0
    seconds: float = 0.0


def loss_precision(precision: str) -> str:
    """Of the loss's matrix products on a GPU: that of the towers' own, or fp32's accuracy."""
    return "auto" if PRECISIONS[precision] is None else "bf16"


class NonFiniteError(RuntimeError):
    """A feature, loss or gradient is not finite; the model keeps the weights of the step before."""


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, else a GPU, else the CPU; ``cuda`` alone means this rank's own."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    picked = torch.device(device)
    if picked.type == "cuda":
        if picked.index is None:
            picked = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(picked)
    return picked


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
    log: TrainLog | None = None,
) -> TrainLog:
    """Train ``model`` in place; every rank of a distributed run calls this with its own share.

    Whatever ends the run early, Ctrl-C included, finds the model at the last whole step and
    ``log`` complete up to it.

    Args:
        model: on ``device``, with the same weights on every rank.
        loader: yields this rank's batches (see ``batches``); walked anew for each epoch, the first
            being epoch 0, after ``set_epoch`` where it or its sampler has one.
        on_step: called after each step with (step, record, model); returning True ends the run,
            whichever rank says so.
        log: filled in as the run goes; default a new one.
    Raises:
        ValueError, TypeError: a batch, the model or a setting cannot be used; before any step
            where that can be known before.
        NonFiniteError: naming the tensor; the model keeps its last good weights.
        KeyboardInterrupt: on Ctrl-C, once the step in flight is complete.
    """
    log = TrainLog() if log is None else log
    ranks = Ranks.start(device)
    feed = Feed(loader, rules, ranks, device, steps=settings.steps, epochs=settings.epochs)
    steps = feed.steps
    frozen = logit_scale_parameters(model)
    train_scale = not settings.freeze_scale and isinstance(model.logit_scale, nn.Parameter)
    if not train_scale:
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
    cuda = [device] if device.type == "cuda" else []
    started = time.perf_counter()
    with (
        _Progress(steps, settings.progress, ranks.rank == 0) as bar,
        torch.random.fork_rng(devices=cuda),
        DeferredInterrupt() as interrupt,
    ):
        torch.manual_seed(settings.seed + 0x9E3779B1 * ranks.rank)
        for k, item in enumerate(feed):
            x = model_input(
                item.batch,
                rules,
                device=device,
                dtype=encode.input_dtype(model),
                ids=item.ids,
                augment=settings.augment,
                seed=settings.seed,
                view=item.epoch,
            )
            tokens = item.batch.tokens.to(device)
            image, text = encode.image(model, x), encode.text(model, tokens)
            constants = objective.reference(x, tokens)
            temperature = model.logit_scale.exp() if train_scale else scale(model)
            counts = item.counts if ranks.size > 1 else None
            loss, terms = objective(image, text, temperature, constants, counts)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            ranks.sum_gradients(p for _, p in named)
            record = _checked_record(k, {"loss": loss, **terms}, named, image, text, constants)
            record["lr"] = schedule(k, steps)
            for group in optimizer.param_groups:
                group["lr"] = record["lr"]
            optimizer.step()
            if train_scale:
                with torch.no_grad():
                    model.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)
            log.pairs += sum(item.counts)
            log.seconds = time.perf_counter() - started
            log.steps.append({"step": k, "epoch": item.epoch, **record})
            bar.advance(record, log.pairs / log.seconds)
            if on_step is not None:
                paused = time.perf_counter()
                if on_step(k, record, model) is True:
                    feed.stop()
                started += time.perf_counter() - paused  # the hook's time is its own
            log.skipped_batches = feed.skipped
            interrupt.check()
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


def _checked_record(
    step: int,
    scalars: dict[str, Tensor],
    named: list[tuple[str, Tensor]],
    image: Tensor,
    text: Tensor,
    constants: tuple[Tensor, ...],
) -> dict[str, float]:
    """The step's numbers on the host, in one transfer; refused when any is not finite."""
    grads = [(n, p.grad) for n, p in named if p.grad is not None]
    if not grads:
        raise ValueError("the loss reaches no parameter of the model: is everything frozen?")
    norms = torch._foreach_norm([g for _, g in grads])
    values = torch.stack([t.detach().double() for t in (*scalars.values(), *norms)]).tolist()
    record = dict(zip(scalars, values, strict=False))
    if all(map(math.isfinite, values)):
        return record
    features = {"image features": image, "text features": text}
    features |= {f"reference features {i}": f for i, f in enumerate(constants)}
    broken = [
        f"{name} of {int((~rows.isfinite()).any(-1).sum())} of {len(rows)} pairs"
        for name, rows in features.items()
        if not rows.isfinite().all()
    ]
    broken += [name for name, value in record.items() if not math.isfinite(value)]
    broken += [f"gradient of {name}" for name, grad in grads if not grad.isfinite().all()]
    if not broken:  # a norm can overflow where no entry does
        return record
    more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
    raise NonFiniteError(
        f"step {step}: not finite: {', '.join(broken[:3])}{more}; the weights of the step before "
        "are kept"
    )


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
