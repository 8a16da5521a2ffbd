"""Chooses the backend of a call, and can say why."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import NamedTuple

import torch

from pybackdoor._native import cuda_status

BACKENDS = ("cuda", "triton", "cpu", "reference")
# What each op has, besides the reference; kernels/<op>.py is its Triton twin.
NATIVE_CPU = frozenset({"adamw_ema", "contrastive_par", "trigger_normalize"})  # or torch's best
NATIVE_CUDA = frozenset({"adamw_ema", "contrastive_par", "trigger_normalize"})
TRITON = frozenset({"adamw_ema", "contrastive_par", "trigger_normalize"})
TRITON_MATRICES = frozenset({"contrastive_par"})  # matrix products in Triton under either backend


class Choice(NamedTuple):
    """A backend (cuda, triton, cpu or reference) and the reason it was chosen."""

    name: str
    reason: str


def _obstacle(name: str, device: torch.device, op: str) -> str | None:
    """Why backend `name` cannot run `op` on that device; None if it can."""
    if name == "reference":
        return None
    if name == "cpu":
        if device.type != "cpu":
            return f"the tensor is on {device.type}"
        return None if op in NATIVE_CPU else f"{op} has no native CPU kernel"
    if device.type != "cuda":
        return f"the tensor is on {device.type}"
    if name == "triton":
        return _triton_obstacle(device) if op in TRITON else f"{op} has no Triton kernel"
    if op not in NATIVE_CUDA:
        return f"{op} has no native CUDA kernel"
    obstacle = cuda_status(device.index or 0)
    if obstacle is None and op in TRITON_MATRICES:
        obstacle = _triton_obstacle(device)
    return obstacle


def check_device(device: torch.device | str | int) -> None:
    """Raises ValueError where torch cannot put a tensor there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"device must be usable here, got {str(device)!r} ({reason})") from None


@cache
def _triton_obstacle(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on that device; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"the kernels need sm_80, this device is sm_{major}{minor}"


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)


def choose(x: torch.Tensor | torch.device, op: str, *, warn: bool = True) -> Choice:
    """The backend that `op` takes for tensor (or device) x, with the reason.

    CUDA: native CUDA if the driver answers and the build has code for that device ("cuda": the
    first), else Triton if the op has a twin, else the reference, with one warning unless warn is
    off. CPU: native CPU. PYBACKDOOR_BACKEND forces one.

    Raises:
        RuntimeError: PYBACKDOOR_BACKEND names a backend that cannot run this call.
        ValueError: PYBACKDOOR_BACKEND names no backend.
    """
    device = x if isinstance(x, torch.device) else x.device
    forced = os.environ.get("PYBACKDOOR_BACKEND")
    if forced:
        if forced not in BACKENDS:
            raise ValueError(
                f"{op}: PYBACKDOOR_BACKEND must be one of {', '.join(BACKENDS)}, got {forced!r}"
            )
        obstacle = _obstacle(forced, device, op)
        if obstacle:
            raise RuntimeError(f"{op}: PYBACKDOOR_BACKEND={forced} cannot be used: {obstacle}")
        return Choice(forced, "forced by PYBACKDOOR_BACKEND")
    reasons = []
    for name in ("cpu",) if device.type == "cpu" else ("cuda", "triton"):
        obstacle = _obstacle(name, device, op)
        if obstacle is None:
            text = "; ".join([*reasons, f"native {name}" if name != "triton" else "Triton"])
            return Choice(name, text)
        reasons.append(f"{name}: {obstacle}")
    reason = "; ".join(reasons)
    if warn:
        _warn_once(f"{op}: runs the slow reference on {device.type} ({reason})")
    return Choice("reference", reason)


@contextmanager
def running_on(device: torch.device) -> Iterator[None]:
    """An op's own dtypes, whatever autocast says, on a current device, where Triton launches."""
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with current, torch.autocast(device.type, enabled=False):
        yield
