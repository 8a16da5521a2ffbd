"""What a run is told, and what it tells."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .._backend import check_device
from ..ops import Augment
from .history import History

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "amp_bf16": torch.bfloat16}
LOCKS = ("text",)
_KEPT = ("pairs", "faults", "seconds", "waiting")  # of a log, in a checkpoint, besides its steps
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
CAPTURED = COMPILE_MODES[1:]  # replayed from CUDA graphs, whose results the next replay overwrites

Schedule = Callable[[int, int], float]  # (step, steps) -> learning rate
Tracker = Callable[[int, dict[str, float]], None]
StepHook = Callable[[int, dict[str, float], nn.Module], bool | None]


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
        seed: of augmentation and dropout; each step draws from numbers of its own.
        freeze_scale: leave logit_scale alone; else it is trained and kept at or below ln 100.
        freeze_batchnorm: batch norm uses its running statistics and leaves them alone.
        progress: show a progress bar; None when standard error is a terminal.
        micro_batch: pairs encoded at a time, for a batch that does not fit into memory: loss and
            gradients stay those of the whole batch, for one more forward pass. None: all.
        trim_text: encode captions without the padding that all of a batch share, and on a CPU in
            groups of similar length, where the model gives the same features for it (checked on
            the first batch).
        cache_text: compute a frozen model's features of the loader's captions once, at the start,
            where the loader numbers them and as many pairs will be seen.
        lock: None, or "text": the text tower is left as it is and the image tower alone trained.
        views: augment a pair in epoch e as in epoch e mod views, and keep a frozen model's image
            features from one to the other; None: each epoch in a way of its own. The loader must
            name its images (``image_ids``).
        compile: None, or a mode of torch.compile for both towers: "default", "reduce-overhead"
            or "max-autotune" (both with CUDA graphs, which exclude ``micro_batch``).
        max_faults: batches whose loss or gradients are not finite that may be left out before the
            run is given up.
        shard: split parameters, gradients and the optimiser's state over the ranks, see
            ``sharding``; nothing for a single process.
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
    micro_batch: int | None = None
    trim_text: bool = True
    cache_text: bool = True
    lock: str | None = None
    views: int | None = None
    compile: str | None = None
    max_faults: int = 3
    shard: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            wanted = ["auto", *PRECISIONS]
            raise ValueError(f"precision must be one of {wanted}, got {self.precision!r}")
        if self.compile is not None and self.compile not in COMPILE_MODES:
            raise ValueError(
                f"compile must be None or one of {list(COMPILE_MODES)}, got {self.compile!r}"
            )
        if self.compile in CAPTURED and self.micro_batch is not None:
            raise ValueError(
                f"compile={self.compile!r} and micro_batch exclude each other: the CUDA graph of a "
                "micro-batch would write over the gradients of the one before it: choose "
                "compile='default'"
            )
        for name in ("compile", "lock", "views") if self.shard else ():
            if getattr(self, name) is not None:
                raise ValueError(f"shard and {name} exclude each other: choose one")
        if self.lock is not None and self.lock not in LOCKS:
            raise ValueError(f"lock must be None or one of {list(LOCKS)}, got {self.lock!r}")
        limits = {"steps": 1, "epochs": 1, "seed": 0, "micro_batch": 1, "views": 1, "max_faults": 0}
        for name, least in limits.items():
            value = getattr(self, name)
            if value is None and name in ("steps", "micro_batch", "views"):
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if not least <= value < 2**62:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")

    def view(self, epoch: int) -> int:
        """The number of the augmentation that an epoch shows."""
        return epoch if self.views is None else epoch % self.views


@dataclass
class TrainLog:
    """What a run did: each step's numbers, how many batches it could not use, and how long it took.

    Attributes:
        faults: what was not finite, and was left out or rolled back.
        seconds: leaves out the time spent in a step hook.
        waiting: seconds of it that the loader kept the step waiting.
        scattered: whether the model's weights remain in parts, since this rank has ended otherwise
            than all of them together.
    """

    steps: History = field(default_factory=History)
    pairs: int = 0
    skipped_batches: int = 0
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    waiting: float = 0.0
    scattered: bool = False

    def kept(self) -> dict[str, Any]:
        """What a checkpoint holds of it; JSON-ready."""
        kept = {name: getattr(self, name) for name in _KEPT}
        return {**kept, "steps": list(self.steps)}

    def return_to(self, kept: Mapping[str, Any]) -> None:
        """Back to a checkpoint's; what was not finite since then stays told."""
        faults = self.faults
        for name, value in kept.items():
            setattr(self, name, value)
        self.steps, self.faults = History(kept["steps"]), max(faults, self.faults, key=len)


def loss_precision(precision: str) -> str:
    """Of the loss's matrix products on a GPU: that of the towers' own, or fp32's accuracy."""
    return "auto" if PRECISIONS[precision] is None else "bf16"


def pick_precision(precision: str, device: torch.device) -> str:
    """What "auto" stands for: bf16 where the device has instructions for it, else fp32.

    A CPU without them takes several times as long in bf16 as in fp32.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = _has_bf16()
    return "bf16" if fast else "fp32"


def _has_bf16() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return torch.cpu._is_avx512_bf16_supported()  # torch 2.10


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, else a GPU, else the CPU; ``cuda`` alone means this rank's own."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if str(device) == "cuda":  # not before: to look at it would open a context on the first GPU
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    check_device(device)
    picked = torch.device(device)
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    return picked
