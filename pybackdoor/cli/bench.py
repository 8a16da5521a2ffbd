"""`pybackdoor bench`: what to expect of a cleaning run on this machine, from a few of its steps."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..engine import loss_precision, pick_device, pick_precision
from ..methods import par_clean
from ..models import LoadedModel
from ..ops import contrastive_par
from ..options import UsageError, option
from . import inputs
from .configs import PRECISION, PRECISIONS, ModelOptions

_CAPTION = "a photo of a small brown dog that runs along the beach"
_WARM = 2  # steps before those that count: allocations, and the check of the captions' padding


@dataclass(frozen=True)
class BenchConfig(ModelOptions):
    """Measure cleaning's own step on synthetic images: speed, memory, and the time for N pairs."""

    batch_size: int = option(512, "pairs per step")
    steps: int = option(10, "steps that are timed, after two that are not")
    precision: str = option("auto", PRECISION, choices=PRECISIONS)
    pairs: int = option(250_000, "pairs of the run whose time is estimated")
    epochs: int = option(2, "passes of that run over them")
    micro_batch: int | None = option(None, "pairs encoded at a time, as in clean")


class Synthetic:
    """A loader of one batch of random pixels, given again and again, with a clock."""

    def __init__(self, config: BenchConfig, loaded: LoadedModel, device: torch.device) -> None:
        side, n = loaded.preprocess.size, config.batch_size
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(
            0, 256, (n, side, side, 3), dtype=torch.uint8, generator=generator, device="cpu"
        )
        self.tokens = loaded.tokenizer([_CAPTION[: -1 - i % 20] for i in range(n)])
        self._steps, self.device = _WARM + config.steps, device
        self.seconds = 0.0  # of the steps that count

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(self._steps):
            if step == _WARM:
                self._began = self.now()
            yield self.images, self.tokens

    def track(self, step: int, record: dict[str, float]) -> None:
        """Stops the clock at the last step; par_clean calls it."""
        if step + 1 == self._steps:
            self.seconds = self.now() - self._began

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def measure(config: BenchConfig) -> dict[str, Any]:
    """Runs the steps.

    Returns:
        JSON-ready: device, threads, batch_size, precision, step_ms (mean), samples_per_second,
        loss_ms and loss_share of the step (forward and backward), peak_memory_bytes (of the
        process on a CPU, of torch's allocator on a GPU; None where unknown), pairs, epochs,
        estimated_seconds (training alone).
    """
    for name, least in {"batch_size": 2, "steps": 1, "pairs": 2, "epochs": 1}.items():
        if getattr(config, name) < least:
            raise UsageError(f"{name} must be at least {least}, got {getattr(config, name)}")
    loaded, device = inputs.read_model(config, untrained=True), pick_device(config.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    config = replace(config, precision=pick_precision(config.precision, device))
    loader = Synthetic(config, loaded, device)
    par_clean(
        loaded.model, loader, epochs=1, precision=config.precision, device=device,
        mean=loaded.preprocess.mean, std=loaded.preprocess.std, progress=config.progress,
        micro_batch=config.micro_batch, track=loader.track, repair=False,
    )  # fmt: skip
    step = loader.seconds / config.steps
    width = loaded.model.to(device).encode_text(loader.tokens[:1].to(device)).shape[1]
    loss = _loss_seconds(config, width, loader)
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "batch_size": config.batch_size,
        "precision": config.precision,
        "step_ms": 1e3 * step,
        "samples_per_second": config.batch_size / step,
        "loss_ms": 1e3 * loss,
        "loss_share": loss / step,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if cuda else _peak_resident(),
        "pairs": config.pairs,
        "epochs": config.epochs,
        "estimated_seconds": config.pairs * config.epochs * step / config.batch_size,
    }


def _loss_seconds(config: BenchConfig, width: int, loader: Synthetic) -> float:
    """Of the loss alone, forward and backward."""
    rows = torch.nn.functional.normalize(
        torch.randn(4, config.batch_size, width, device=loader.device), dim=-1
    )
    text, image, text_ref, image_ref = rows
    scale, times = torch.tensor(14.3, device=loader.device), []
    for _ in range(_WARM + config.steps):
        leaves = [t.clone().requires_grad_() for t in (text, image)]
        began = loader.now()
        contrastive_par(
            *leaves, scale, image_ref=image_ref, text_ref=text_ref, distance_weight=0.5, tau=2.15,
            normalize=False, precision=loss_precision(config.precision),
        ).loss.backward()  # fmt: skip
        times.append(loader.now() - began)
    return statistics.median(times[_WARM:])


def _peak_resident() -> int | None:
    """Bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def text(found: dict[str, Any]) -> str:
    """The figures for people."""
    hours, peak = found["estimated_seconds"] / 3600, found["peak_memory_bytes"]
    memory = "unknown" if peak is None else f"{peak / 1e9:.2f} GB"
    return f"""\
device            {found["device"]}, {found["precision"]}, batch {found["batch_size"]}
training          {found["samples_per_second"]:.1f} pairs/s, {found["step_ms"]:.0f} ms a step
of that the loss  {found["loss_ms"]:.2f} ms, {found["loss_share"]:.1%}
peak memory       {memory}
{found["epochs"]} x {found["pairs"]:,} pairs: about {hours:.2f} h of training,
without reading files and evaluation"""
