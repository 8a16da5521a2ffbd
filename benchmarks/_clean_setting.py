"""What the three providers of the cleaning benchmark share: model, files, batches, clocks."""

from __future__ import annotations

import copy
import csv
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from _clean_data import Files
from _timing import synchronize
from torch import Tensor, nn

from pybackdoor.models import LoadedModel

TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "a close-up photo of a {}.",
    "a bright photo of a {}.",
    "a dark photo of a {}.",
    "a photo of the small {}.",
    "itap of a {}.",
)
TAU, WEIGHT = 2.15, 0.5  # of the PAR loss
RATES = (3e-5, 3e-6, 1e-9)  # at the start, after the first half, at the end
NOISE_P, NOISE_STD, ERASE_P, ERASE_AREA = 0.5, 0.2, 0.5, (0.005, 0.01)  # PAR's augmentation

Batch = tuple[Tensor, Tensor, Tensor]  # [n, H, W, 3] uint8, [n, L] tokens, [n] ids


class Stages:
    """Seconds by stage; those of a stage within another are not counted twice.

    Args:
        device: waited for at each end, so that a pass with stages is no timing.
    """

    def __init__(self, device: str) -> None:
        self._device, self._open, self._since = device, [], 0.0
        self.seconds: dict[str, float] = {}

    def clear(self) -> None:
        """Forgets what was; open stages go on from now."""
        self._turn()
        self.seconds.clear()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        synchronize(self._device)
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


class Parts(dict):
    """Seconds by part of a run; every part ends with numbers on the host."""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self[name] = self.get(name, 0.0) + time.perf_counter() - began


def no_stages(name: str) -> nullcontext:
    """Stands for Stages in the timed passes."""
    return nullcontext()


@dataclass
class Setting:
    """One model, one set of files, one device.

    Attributes:
        loaded: the model that every provider copies, with its tokenizer and preprocessing.
        batch: pairs a step.
        evaluation_batch: images or prompts a time, of the providers that choose it.
        precision: "fp32", or "bf16" for autocast.
        steps: of the learning rate's schedule.
        workers: processes or threads that decode.
        stages: clock of the instrumented pass.
    """

    loaded: LoadedModel
    files: Files
    device: str
    batch: int
    evaluation_batch: int
    precision: str
    workers: int
    threads: int
    compile: bool
    steps: int = 100
    augment: bool = True
    rates: tuple[float, float, float] = RATES
    stages: Callable = field(default=no_stages)

    def __post_init__(self) -> None:
        wanted = self.loaded.preprocess
        self.side, self.mean, self.std = wanted.size, wanted.mean, wanted.std
        self.tokenizer = self.loaded.tokenizer

    def pair(self) -> tuple[nn.Module, nn.Module]:
        """A copy whose weights but the scale are trained, and a frozen one."""
        student = copy.deepcopy(self.loaded.model).to(self.device).requires_grad_(True)
        training(student)
        student.logit_scale.requires_grad_(False)
        frozen = copy.deepcopy(self.loaded.model).to(self.device).eval().requires_grad_(False)
        return student, frozen

    def autocast(self, enabled: bool = True) -> torch.autocast:
        """bf16 where the precision asks for it."""
        mixed = enabled and self.precision == "bf16"
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=mixed)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """mean and std of the channels, [3, 1, 1] on the device."""
        mean, std = (torch.tensor(v, device=self.device) for v in (self.mean, self.std))
        return mean.view(3, 1, 1), std.view(3, 1, 1)

    def table(self, which: str) -> list[tuple[str, str]]:
        """(path, caption) of "pairs" or (path, label) of "tests"."""
        path = getattr(self.files, which)
        with path.open(newline="") as file:
            rows = list(csv.reader(file))[1:]
        return [(str(path.parent / name), text) for name, text in rows]

    def epoch(self, number: int, pairs: int) -> list[np.ndarray]:
        """An epoch's batches, as rows of the table."""
        order = np.random.default_rng([number, 3]).permutation(pairs)
        return list(order[: pairs - pairs % self.batch].reshape(-1, self.batch))


def training(model: nn.Module) -> None:
    """Training mode, but for batch norm, whose statistics stay as they are."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def rate(step: int, setting: Setting) -> float:
    """PAR's learning rate: linear in the first half, then a cosine."""
    start, middle, end = setting.rates
    warm = setting.steps // 2
    if step < warm:
        return start + (middle - start) * step / max(warm - 1, 1)
    turn = math.cos(math.pi * (step - warm) / max(setting.steps - warm, 1))
    return end + 0.5 * (middle - end) * (1 + turn)


def parameter_groups(model: nn.Module) -> list[dict]:
    """AdamW's: no decay for vectors, scalars, biases and norms."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    free = {n for n, p in named if p.ndim < 2 or any(k in n for k in ("bias", "ln", "bn"))}
    return [
        {"params": [p for n, p in named if n not in free], "weight_decay": 1e-4},
        {"params": [p for n, p in named if n in free], "weight_decay": 0.0},
    ]
