"""What every cleaning method shares: copy the model, train the copy, report what changed."""

from __future__ import annotations

import copy
import math
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .batches import InputRules, Tokenizer
from .engine import (
    Interrupted,
    Objective,
    Schedule,
    Settings,
    StepHook,
    TrainLog,
    check_model,
    pick_device,
    train,
)
from .ops import Augment


@dataclass(frozen=True)
class CleanResult:
    """A cleaned model and how it came about.

    Attributes:
        model: the cleaned copy, in evaluation mode, on the device it was trained on.
        history: one dict per step: step, epoch, loss, lr and the method's own terms.
        report: method, its settings, steps, pairs, seconds, device and versions; JSON-serialisable.
            It makes no claim of removal: that takes ``evaluate`` with a verified trigger.
    """

    model: nn.Module
    history: list[dict[str, float]]
    report: dict[str, Any]


class CleaningInterrupted(KeyboardInterrupt):
    """Ctrl-C during cleaning; ``result`` holds the state after the last whole step."""

    def __init__(self, result: CleanResult) -> None:
        super().__init__(f"cleaning stopped after {len(result.history)} steps")
        self.result = result


def two_phase_schedule(lr_start: float, lr: float, lr_end: float) -> Schedule:
    """PAR's learning rate: linear lr_start -> lr in the first half, then cosine to lr_end.

    For K steps and Kw = floor(K/2): step k < Kw takes lr_start + (lr - lr_start)·k/(Kw - 1), step
    k >= Kw takes lr_end + ½(lr - lr_end)(1 + cos(π(k - Kw)/(K - Kw))) (arXiv 2412.00727).
    """
    for name, value in (("lr_start", lr_start), ("lr", lr), ("lr_end", lr_end)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be a learning rate in [0, 1), got {value}")

    def rate(k: int, steps: int) -> float:
        warm = steps // 2
        if k < warm:
            return lr_start + (lr - lr_start) * k / max(warm - 1, 1)
        return lr_end + 0.5 * (lr - lr_end) * (1 + math.cos(math.pi * (k - warm) / (steps - warm)))

    return rate


def clean(
    method: str,
    model: nn.Module,
    loader: Iterable[Any],
    objective: Callable[[nn.Module], Objective],
    schedule: Schedule,
    settings: Settings,
    *,
    augment: bool | Augment,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    tokenizer: Tokenizer | None,
    device: str | torch.device | None,
    on_step: StepHook | None,
    report: dict[str, Any],
) -> CleanResult:
    """Train a copy of ``model``; the model given keeps its weights, mode and device.

    Args:
        objective: makes the method's objective from a frozen copy of the model in evaluation mode.
        report: the method's own settings, kept in the result's report.
    """
    check_model(model)
    rules = InputRules.of(model, mean=mean, std=std, tokenizer=tokenizer)
    where = pick_device(device)
    student = trainable_copy(model).to(where)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    settings = replace(settings, augment=_augmentation(augment))
    try:
        log = train(
            student,
            loader,
            objective(teacher),
            schedule,
            settings,
            rules=rules,
            device=where,
            on_step=on_step,
        )
    except Interrupted as stop:
        result = _result(method, student, stop.log, where, {**report, "interrupted": True})
        raise CleaningInterrupted(result) from stop
    return _result(method, student, log, where, report)


def trainable_copy(model: nn.Module) -> nn.Module:
    """A copy with every floating-point parameter trainable, and half-precision weights in fp32."""
    student = copy.deepcopy(model)
    for p in student.parameters():
        if p.is_floating_point():
            if p.dtype in (torch.float16, torch.bfloat16):
                p.data = p.data.float()
            p.requires_grad_(True)
    for module in student.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.dtype in (torch.float16, torch.bfloat16):
                setattr(module, name, buffer.float())
    return student


def _augmentation(augment: bool | Augment) -> Augment | None:
    if isinstance(augment, bool):
        return Augment() if augment else None
    return augment


def _result(
    method: str, model: nn.Module, log: TrainLog, device: torch.device, report: dict[str, Any]
) -> CleanResult:
    from . import __version__

    for p in model.parameters():
        p.grad = None
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return CleanResult(
        model.eval(),
        log.steps,
        {
            "method": method,
            **report,
            "steps_done": len(log.steps),
            "pairs_seen": log.pairs,
            "skipped_batches": log.skipped_batches,
            "seconds": round(log.seconds, 3),
            "device": gpu or platform.processor() or platform.machine(),
            "versions": {"pybackdoor": __version__, "torch": torch.__version__},
        },
    )
