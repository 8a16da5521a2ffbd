"""The state of a run on disk: written so that a kill at any moment leaves a valid one.

A checkpoint is `step_N.safetensors` with the tensors and `step_N.json` with the rest and the
SHA-256 of the tensors; the second, renamed into place last, is what makes it exist. The newest two
valid ones are kept. Nothing in them is executed when they are read. `.lock` keeps a second run out.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..files import LOCK, PROBE, file_sha256, hold, sync_folder, writable_folder, write_atomically
from .sharding import Parts

_SCHEMA = "pybackdoor.checkpoint/1"
_SUFFIXES = (".json", ".safetensors", ".tmp")
_HEADROOM = 1.05  # of a checkpoint's size: what must be free before one is written
# Which data it was, by hashes: the first checkpoints do not tell.
_DATA = ("loader captions", "loader ids", "loader locations", "suspects")


@dataclass(frozen=True)
class Checkpoints:
    """Where and when the state of a run is kept.

    Attributes:
        folder: of one run; created with its parents.
        resume: continue from the newest valid checkpoint, if there is one; else a folder that has
            one is refused.
        minutes: between checkpoints; 0 for one after each step. One is written at the end, on
            Ctrl-C and on SIGTERM, too.
        force: continue even though the settings or the data have changed.
    """

    folder: str | os.PathLike
    resume: bool = False
    minutes: float = 10.0
    force: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.minutes < float("inf"):
            raise ValueError(f"minutes between checkpoints must be at least 0, got {self.minutes}")


class State(NamedTuple):
    """What a checkpoint holds."""

    tensors: dict[str, Tensor]  # on the CPU
    content: dict[str, Any]  # JSON-ready: "step", "config" and whatever the run adds


class CheckpointFolder:
    """A run's folder, held against other runs until it is closed.

    Args:
        config: JSON-ready description of the run; a checkpoint of another one is refused.
    Raises:
        RuntimeError: another process holds the folder.
        ValueError: the folder has checkpoints and ``resume`` is off, or they are of other settings
            or data.
        OSError: the folder cannot be written.
    """

    def __init__(self, settings: Checkpoints, config: Mapping[str, Any]) -> None:
        self._settings, self._config = settings, json.loads(json.dumps(config))
        self.folder = writable_folder(settings.folder)
        self._lock = hold(self.folder)
        self._saved = time.monotonic()
        self.step: int | None = None  # of the newest checkpoint known to be valid
        try:
            if not settings.resume and steps_in(self.folder):
                raise ValueError(
                    f"{self.folder} holds the checkpoints of a run: resume it, or choose another "
                    "folder"
                )
        except BaseException:
            self.close()
            raise

    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return time.monotonic() - self._saved >= 60 * self._settings.minutes

    def latest(self) -> State | None:
        """The newest valid checkpoint; those that are not are put aside, and named in a warning.

        One from before the data was told apart is taken, with a warning.

        Raises:
            ValueError: it is of other settings or data, each difference is listed; unless
                ``force``. Or it is of another version's format.
            OSError: it cannot be read, though it is there.
        """
        for step in reversed(steps_in(self.folder)):
            try:
                state = self._read(step)
            except (_Damaged, FileNotFoundError) as error:
                warnings.warn(
                    f"checkpoint {step} in {self.folder} is damaged and left out: {error}",
                    UserWarning,
                    stacklevel=3,
                )
                for suffix in (".json", ".safetensors"):
                    path = self.folder / f"step_{step}{suffix}"
                    with suppress(OSError):
                        path.rename(path.with_name(f"damaged_{path.name}"))
                continue
            before = state.content["config"]
            untold = [name for name in _DATA if name in self._config and name not in before]
            changed = differences(before, {**self._config, **dict.fromkeys(untold)})
            if changed and not self._settings.force:
                raise ValueError(
                    f"{self.folder} holds a run with other settings ({'; '.join(changed)}): "
                    "resume it with the same, choose another folder, or force it"
                )
            if untold:
                warnings.warn(
                    f"checkpoint {step} in {self.folder} does not tell which data it was trained "
                    "on: that it is the same is not checked",
                    UserWarning,
                    stacklevel=3,
                )
            self.step = step
            return state
        return None

    def save(self, step: int, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> bool:
        """Writes a checkpoint; where the disk does not let it, warns and keeps the last ones."""
        self._saved = time.monotonic()
        size = sum(t.nbytes for t in tensors.values())
        free = shutil.disk_usage(self.folder).free
        if free < size * _HEADROOM:
            warnings.warn(
                f"no checkpoint at step {step}: it needs {size / 1e9:.2f} GB, {self.folder} has "
                f"{free / 1e9:.2f} GB free; {self._still()}",
                RuntimeWarning,
                stacklevel=3,
            )
            return False
        try:
            self._write(step, tensors, content)
        except _write_errors() as error:
            warnings.warn(
                f"no checkpoint at step {step}: {error}; {self._still()}",
                RuntimeWarning,
                stacklevel=3,
            )
            return False
        self.step = step
        return True

    def _still(self) -> str:
        """What there is in place of a new one."""
        if self.step is None:
            return "there is none yet to resume from"
        return f"that of step {self.step} is kept"

    def close(self) -> None:
        """Lets other runs use the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> CheckpointFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _write(self, step: int, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
        from safetensors import torch as files

        path = self.folder / f"step_{step}.safetensors"
        part = path.with_suffix(".tmp")
        try:
            files.save_file({n: t.contiguous() for n, t in tensors.items()}, part)
            digest = file_sha256(part)
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        whole = {
            "schema": _SCHEMA, "step": step, "sha256": digest, "config": self._config, **content
        }  # fmt: skip
        text = json.dumps(whole, allow_nan=False)
        sealed = {"content": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        write_atomically(path.with_suffix(".json"), json.dumps(sealed).encode())
        sync_folder(self.folder)
        keep = {step, *([] if self.step is None else [self.step])}
        for old in self.folder.glob("step_*"):
            number = _step_of(old)
            if number is not None and number not in keep:
                # The record first: a checkpoint without its tensors would look damaged.
                for suffix in _SUFFIXES:
                    old.with_suffix(suffix).unlink(missing_ok=True)

    def _read(self, step: int) -> State:
        from safetensors import torch as files

        path = self.folder / f"step_{step}.safetensors"
        try:
            sealed = json.loads(path.with_suffix(".json").read_bytes())
            text, digest = sealed["content"], sealed["sha256"]
            intact = hashlib.sha256(text.encode()).hexdigest() == digest
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _Damaged(f"its record cannot be read ({error})") from None
        if not intact:
            raise _Damaged("its record is not what was written")
        content = json.loads(text)
        if content["schema"] != _SCHEMA:
            raise ValueError(
                f"the checkpoints in {self.folder} are of the format {content['schema']!r}, this "
                f"version reads {_SCHEMA!r}: resume with the version that wrote them"
            )
        if file_sha256(path) != content["sha256"]:
            raise _Damaged("its tensors are not what was written")
        return State(files.load_file(path), content)


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, ascending, damaged ones among them."""
    found = (_step_of(path) for path in folder.glob("step_*.json"))
    return sorted(step for step in found if step is not None)


def clear(folder: Path) -> None:
    """Removes what runs left in their folder, and the folder itself where nothing else is in it."""
    for path in folder.glob("*"):
        head = path.name.removeprefix("damaged_").partition(".")[0]  # one written in part has two
        ours = head.startswith("step_") and head[5:].isdecimal() and path.suffix in _SUFFIXES
        if ours or path.name == LOCK or path.name.startswith(PROBE):
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _write_errors() -> tuple[type[Exception], ...]:
    """What a failing disk raises, safetensors' own error among it; imported when it is needed."""
    from safetensors import SafetensorError

    return OSError, SafetensorError


class _Damaged(Exception):
    """A checkpoint is not what was written."""


def _step_of(path: Path) -> int | None:
    number = path.stem.removeprefix("step_")
    return int(number) if number.isdecimal() else None


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What of a run's settings has changed, one line each."""
    return [
        f"{name}: was {old.get(name)!r}, is {new.get(name)!r}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


def train_state(
    parts: Parts, optimizer: torch.optim.Optimizer, leader: bool = True
) -> dict[str, Tensor]:
    """Weights and the optimiser's moments, whole and on the CPU, whoever holds them.

    Of a sharded model every rank must call it; {} on those that are not the leader. One tensor at a
    time is whole on the device.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    held = [(f"model/{name}", tensor, tensor) for name, tensor in parts.weights().items()]
    for number, values in optimizer.state_dict()["state"].items():
        owner = params[number]
        held += [(f"optimizer/{number}/{name}", value, owner) for name, value in values.items()]
    found = {}
    for name, tensor, owner in held:
        whole = parts.join(tensor.detach(), owner)
        if leader or not parts.sharded:
            found[name] = whole.detach().cpu()
    return found


def not_finite(tensors: Mapping[str, Tensor], weights: Collection[str]) -> str:
    """Names the tensors of a state that are not finite, of these weights and of the moments; ""."""
    found = [
        name.removeprefix("model/")
        for name, t in tensors.items()
        if name.startswith("optimizer/") or name.removeprefix("model/") in weights
        if not bool(t.isfinite().all())
    ]
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def restore(
    shapes: Mapping[str, torch.Size],
    tensors: Iterable[tuple[str, Tensor]],
    parts: Parts,
    optimizer: torch.optim.Optimizer,
) -> dict[str, Tensor]:
    """Puts a state of ``train_state`` back, whole or this rank's part of it.

    Args:
        shapes: of all tensors.
        tensors: (name, whole tensor) of each, taken one after the other.
    Returns:
        Those of other names, on the CPU.
    Raises:
        ValueError: the model has other weights.
    """
    weights = parts.weights()
    kept = {n.removeprefix("model/"): s for n, s in shapes.items() if n.startswith("model/")}
    wrong = sorted(
        name
        for name in {*weights, *kept}
        if name not in weights or name not in kept or parts.shape(weights[name]) != kept[name]
    )
    if wrong:
        raise ValueError(f"the checkpoint is of another model: {', '.join(wrong[:3])} differ")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    others = {}
    with torch.no_grad():
        for name, tensor in tensors:
            place, _, rest = name.partition("/")
            if place == "model":
                weights[rest].copy_(parts.part(tensor, weights[rest]))
                continue
            if place != "optimizer":
                others[name] = tensor.cpu()
                continue
            number, _, key = rest.partition("/")
            like = params[int(number)]
            tensor = parts.part(tensor, like)
            if tensor.shape == like.shape and tensor.ndim:  # moments lie as their weights do
                tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
            state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return others
