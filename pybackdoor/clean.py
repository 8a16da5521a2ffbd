"""What every cleaning method shares: copy the model, train the copy, report what changed."""

from __future__ import annotations

import difflib
import math
import os
import platform
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, TypedDict

import torch
from torch import nn

from .batches import InputRules, Tokenizer
from .distributed import Ranks
from .engine import (
    Checkpoints,
    Objective,
    Schedule,
    Settings,
    StepHook,
    Tracker,
    TrainLog,
    copied,
    kept_heap,
    pick_device,
    pick_precision,
    train,
)
from .engine.sharding import joined
from .models import check_clip, check_finite, weights_sha256
from .ops import Augment
from .repair import repair_in_place


@dataclass(frozen=True)
class CleanResult:
    """A cleaned model and how it came about.

    Attributes:
        model: the cleaned copy, in evaluation mode, on the device it was trained on; its
            requires_grad flags are those of the model given, whatever was trained.
        history: one dict per step: step, epoch, loss, lr and the method's own terms.
        report: method, its settings, steps, pairs, seconds, the terms of the last step, ``repair``
            (see ``repair_drift``: done, or the reason why not), device and versions;
            JSON-serialisable. It makes no claim of removal: that takes ``evaluate`` with a verified
            trigger.
    """

    model: nn.Module
    history: list[dict[str, float]]
    report: dict[str, Any]


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


class CleanOptions(TypedDict, total=False):
    """What every cleaning method takes beside its own options: see ``par_clean``."""

    epochs: int
    steps: int | None
    lr_start: float
    lr: float
    lr_end: float
    weight_decay: float
    betas: tuple[float, float]
    augment: bool | Augment
    precision: str
    seed: int
    device: str | torch.device | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    tokenizer: Tokenizer | None
    progress: bool | None
    on_step: StepHook | None
    track: Tracker | None
    micro_batch: int | None
    trim_text: bool
    cache_text: bool
    lock: str | None
    views: int | None
    compile: str | None
    repair: bool
    max_faults: int
    folder: str | os.PathLike | None
    resume: bool
    save_minutes: float
    force: bool
    shard: bool


def clean(
    method: str,
    model: nn.Module,
    loader: Iterable[Any],
    objective: Callable[[nn.Module, Settings], Objective],
    own: dict[str, Any],
    fixed: Mapping[str, Any] = MappingProxyType({}),
    /,
    *,
    epochs: int = 2,
    steps: int | None = None,
    lr_start: float = 3e-5,
    lr: float = 3e-6,
    lr_end: float = 1e-9,
    weight_decay: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.98),
    augment: bool | Augment = True,
    precision: str = "auto",
    seed: int = 0,
    device: str | torch.device | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    tokenizer: Tokenizer | None = None,
    progress: bool | None = None,
    on_step: StepHook | None = None,
    track: Tracker | None = None,
    micro_batch: int | None = None,
    trim_text: bool = True,
    cache_text: bool = True,
    lock: str | None = None,
    views: int | None = None,
    compile: str | None = None,
    repair: bool = True,
    max_faults: int = 3,
    folder: str | os.PathLike | None = None,
    resume: bool = False,
    save_minutes: float = 10.0,
    force: bool = False,
    shard: bool = False,
    **unknown: Any,
) -> CleanResult:
    """Train a copy of ``model``; the model given keeps its weights, mode and device.

    Whatever ends the run after its first step, Ctrl-C and a full disk in ``on_step`` included, is
    raised with an attribute ``result``: the CleanResult of the last whole step.

    Args:
        objective: makes the method's objective from the model to be trained, before the first step.
        own: the method's own settings, kept in the result's report.
        fixed: fields of Settings that the method decides.
        The others: see ``par_clean``.
    """
    refuse_unknown(method, unknown, own)
    where = pick_device(device)
    settings = Settings(
        steps, epochs, weight_decay, betas, augmentation(augment),
        pick_precision(precision, where), seed,
        progress=progress, micro_batch=micro_batch, trim_text=trim_text, cache_text=cache_text,
        lock=lock, views=views, compile=compile, max_faults=max_faults, shard=shard, **fixed,
    )  # fmt: skip
    own = {**own, "lr_start": lr_start, "lr": lr, "lr_end": lr_end}
    schedule = two_phase_schedule(lr_start, lr, lr_end)
    rules = InputRules.of(model, mean=mean, std=std, tokenizer=tokenizer)
    kept = kept_in(folder, resume, save_minutes, force)
    student = trainable_copy(model, where, shard=shard)
    split = shard and Ranks().size > 1
    if shard and not split:
        warnings.warn("shard has no effect on a single process", UserWarning, stacklevel=3)
    config = {} if kept is None else identity(method, student, loader, settings, own, rules)
    log = TrainLog()
    why = "the run ended early" if repair else "it was switched off"
    if repair and lock is not None:
        repair, why = False, f"it would turn the {lock} tower, which is locked"
    elif repair and split:
        repair, why = False, "the model is split over ranks: call repair_drift on the result"
        warnings.warn(f"the drift is not repaired: {why}", UserWarning, stacklevel=3)
    mended = {"done": False, "reason": why}

    def result() -> CleanResult:
        for p in student.parameters():
            p.grad = None
        report = _report(method, settings, own, log, where) | {"repair": mended}
        whole = joined(student, full_precision_copy(model).cpu()) if split else student
        for p, given in zip(whole.parameters(), model.parameters(), strict=True):
            p.requires_grad_(given.requires_grad)  # whatever this method and lock left untrained
        return CleanResult(whole.eval(), list(log.steps), report)

    with kept_heap(where), carrying(result, log):
        train(
            student, loader, objective(student, settings), schedule, settings, rules=rules,
            device=where, on_step=on_step, track=track, log=log, checkpoints=kept, config=config,
        )  # fmt: skip
        if repair:
            _repair(student.eval(), model, loader, rules, where, mended)
        return result()


def kept_in(
    folder: str | os.PathLike | None, resume: bool, save_minutes: float, force: bool
) -> Checkpoints | None:
    """Where the run's checkpoints are kept; None without a folder."""
    if folder is None and (resume or force):
        raise ValueError("resume and force need folder, where the checkpoints are, got none")
    return None if folder is None else Checkpoints(folder, resume, save_minutes, force)


def _repair(
    student: nn.Module,
    model: nn.Module,
    loader: Iterable[Any],
    rules: InputRules,
    device: torch.device,
    report: dict[str, Any],
) -> None:
    """Turn the student back towards the model that it was; a reason against it is no failure."""
    reference = trainable_copy(model, device).eval().requires_grad_(False)
    try:
        repair_in_place(student, reference, loader, rules, device, report)
    except ValueError as reason:
        report["reason"] = str(reason)
        warnings.warn(f"the drift is not repaired: {reason}", stacklevel=4)


def refuse_unknown(method: str, options: Iterable[str], own: Iterable[str] = ()) -> None:
    """Refuse options that are neither common nor the method's own, offering the nearest one."""
    known = [*own, *CleanOptions.__annotations__]
    for name in options:
        if name not in CleanOptions.__annotations__:
            close = difflib.get_close_matches(name, known, 1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise TypeError(
                f"{method}_clean: unknown option {name!r}{hint}; known: {', '.join(known)}"
            )


def identity(
    method: str,
    student: nn.Module,
    loader: Iterable[Any],
    settings: Settings,
    own: dict[str, Any],
    rules: InputRules,
) -> dict[str, Any]:
    """What a resumed run must share with the one that was interrupted."""
    told = asdict(settings)
    for name in ("progress", "max_faults", "micro_batch", "shard"):  # they change no result
        del told[name]
    about = {"method": method, **told, **own, "mean": rules.mean, "std": rules.std}
    about["batches"] = len(loader) if hasattr(loader, "__len__") else None
    about |= {f"loader {n}": v for n, v in getattr(loader, "identity", {}).items()}
    return about | {"model": weights_sha256(student)}


@contextmanager
def carrying(result: Callable[[], Any], log: TrainLog) -> Iterator[None]:
    """Give whatever ends the block early an attribute ``result``, once a step has been taken."""
    try:
        yield
    except BaseException as stop:
        if log.steps and not log.scattered:
            stop.result = result()  # type: ignore[attr-defined]
        raise


def trainable_copy(model: nn.Module, device: torch.device, *, shard: bool = False) -> nn.Module:
    """A checked copy, every floating-point parameter trainable, none in half.

    Every rank gets rank 0's weights.

    Args:
        device: where it lies; with ``shard`` on several ranks it stays on the CPU, to go there part
            by part.
    """
    check_clip(model)
    check_finite(model)
    student = full_precision_copy(model)
    ranks = Ranks.start(device)
    student.to("cpu" if shard and ranks.size > 1 else device)
    ranks.same_start(student, device)
    return student


def full_precision_copy(model: nn.Module) -> nn.Module:
    """A copy, every floating-point parameter trainable, none in half."""
    student = copied(model)
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


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode that takes no gradient."""
    return copied(model).eval().requires_grad_(False)


def augmentation(augment: bool | Augment) -> Augment | None:
    """PAR's own augmentation for True, none for False."""
    if isinstance(augment, bool):
        return Augment() if augment else None
    if not isinstance(augment, Augment):
        raise TypeError(f"augment must be True, False or an Augment, got {augment!r}")
    return augment


def _report(
    method: str, settings: Settings, own: dict[str, Any], log: TrainLog, device: torch.device
) -> dict[str, Any]:
    from . import __version__

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "method": method,
        "settings": {**own, **asdict(settings)},
        "steps_done": len(log.steps),
        "pairs_seen": log.pairs,
        "skipped_batches": log.skipped_batches,
        "faults": log.faults,
        "seconds": round(log.seconds, 3),
        "seconds_waiting_for_data": round(log.waiting, 3),
        "last_step": log.steps[-1],
        "processes": Ranks().size,
        "device": gpu or platform.processor() or platform.machine(),
        "versions": {"pybackdoor": __version__, "torch": torch.__version__},
    }
