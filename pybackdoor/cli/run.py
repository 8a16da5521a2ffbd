"""A training command's output folder: what is there before, during and after, come what may."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO

from ..distributed import Ranks
from ..engine import DeferredInterrupt, pick_device
from ..engine.checkpoints import clear, differences, steps_in
from ..engine.history import History
from ..engine.interrupts import exception_of
from ..engine.progress import PACE
from ..files import hold, writable_folder, write_atomically
from ..models import CheckpointError, LoadedModel, refuse_folder
from ..models.folder import read_record, remove_model
from ..options import UsageError, plain, read_yaml, write_yaml
from ..plots import training_curves

_PARTIAL, _HISTORY, _CONFIG = "history.partial.jsonl", "history.jsonl", "config.yaml"
_CHECKPOINTS, _INTERRUPTED = "checkpoints", "interrupted"
_OF_NO_RESULT = {  # they change no result, or where it is alone
    "resume", "force", "save_minutes", "progress", "out", "device", "cache", "cache_dir",
    "micro_batch", "max_faults", "shard",
}  # fmt: skip


def finished(config: Any) -> bool:
    """Whether ``--resume`` finds the result of a run that ended, of these very settings.

    All processes get the first one's answer.

    Raises:
        UsageError: it is of other settings, each is listed; unless ``--force``.
    """
    if config.resume is None:
        return False
    ranks = Ranks.start(pick_device(config.device))
    changed = ranks.from_first(_changed(config) if ranks.rank == 0 else None)
    if changed and not config.force:
        raise UsageError(
            f"--out {config.out} holds the result of a finished run of other settings "
            f"({'; '.join(changed)}): leave --resume out to replace it, or choose another folder"
        )
    return changed == []


def _changed(config: Any) -> list[str] | None:
    """How a finished run's settings differ from these; None where there is no finished run."""
    out = Path(config.out)
    if not all((out / name).exists() for name in (_CONFIG, _HISTORY)):
        return None
    if (out / _PARTIAL).exists() or steps_in(out / _CHECKPOINTS):
        return None
    try:
        saved, written = read_yaml(out / _CONFIG), read_record(out)
    except (UsageError, CheckpointError):  # what cannot be read is none of ours
        return None
    if written is None or not all((out / name).exists() for name in written):
        return None
    default = {field.name: field.default for field in fields(config)}
    return differences(_that_count(default | saved), _that_count(plain(config)))


def _that_count(options: dict[str, Any]) -> dict[str, Any]:
    """Those that a result depends on; files by their real path."""
    return {
        name: os.path.realpath(value) if isinstance(value, str) and os.path.exists(value)
        else list(value) if isinstance(value, tuple) else value
        for name, value in options.items() if name not in _OF_NO_RESULT
    }  # fmt: skip


class Kept(RuntimeError):
    """A run that ended early, with word of where its last state is."""


class KeptInterrupt(KeyboardInterrupt):
    """Likewise, of Ctrl-C."""


class Run:
    """Within the block a command trains; an early end leaves its last state in ``interrupted``.

    A model that the folder holds is replaced by ``finish`` alone. ``history.partial.jsonl`` grows
    by a line per step; at the end ``history.jsonl`` has the whole, ``training.png`` draws it, and
    the checkpoints go. Only the first of several processes writes.

    Args:
        config: with ``out``, ``model`` and ``pretrained``; saved as ``config.yaml`` after the first
            step.
        loaded: the input model, which ``out`` must not hold and must have room for.
        keep: (folder, result) saves a result.
    """

    def __init__(self, config: Any, loaded: LoadedModel, keep: Callable[[Path, Any], None]) -> None:
        self._out, self._keep, self._config = Path(config.out), keep, config
        self._loaded, self._leader = loaded, Ranks().rank == 0
        self.checkpoints = self._out / _CHECKPOINTS
        for option in ("model", "pretrained"):
            self._refuse_input(option, getattr(config, option))
        self._history: TextIO | None = None
        self._lock: TextIO | None = None

    def _refuse_input(self, option: str, name: str | None) -> None:
        """What would be overwritten or removed must not be what is read."""
        path = Path((name or "").removeprefix("local-dir:"))
        if name is None or not path.exists():
            return
        path, out = path.resolve(), self._out.resolve()
        inside = path.parent if path.is_file() else path
        own = {out / _CHECKPOINTS, out / _INTERRUPTED}
        same = out.exists() and os.path.samefile(inside, out)  # by whatever name
        if same or own & {path, *path.parents}:
            raise UsageError(
                f"--out must not be the input model's own folder, got {self._out} for the "
                f"--{option} {name}"
            )

    def __enter__(self) -> Run:
        if self._leader:
            self._lock = hold(writable_folder(self._out))
            try:
                refuse_folder(self._loaded, self._out)
            except BaseException:
                self._unlock()
                raise
        return self

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def _begin(self, step: int) -> None:
        """The first step is done: nothing of another run is touched before."""
        write_yaml(self._config, self._out / _CONFIG)
        path = self._out / _PARTIAL
        lines = path.read_text(encoding="utf-8").splitlines() if step and path.exists() else []
        write_atomically(path, "".join(f"{line}\n" for line in lines[:step]).encode())
        self._history = open(path, "a", encoding="utf-8", buffering=1)

    def record(self, step: int, terms: dict[str, float]) -> None:
        """One line of history."""
        if self._leader and self._history is None:
            self._begin(step)
        if self._history is not None:
            self._history.write(json.dumps({"step": step, **terms}) + "\n")

    def finish(self, result: Any) -> None:
        """Save the result of the whole run."""
        if not self._leader:
            return
        curves = self._out / "training.png"
        with DeferredInterrupt() as interrupt:
            try:
                self._keep(self._out, result)
            except OSError as error:
                if resumable := self._resumable():
                    raise Kept(f"{error}; {resumable}") from error
                raise
            if self._history is None:  # not a step was taken
                write_yaml(self._config, self._out / _CONFIG)
            history = self._with_pace(result.history)
            lines = "".join(json.dumps(record) + "\n" for record in history)
            write_atomically(self._out / _HISTORY, lines.encode())
            if history:
                training_curves(history, curves)
            else:
                curves.unlink(missing_ok=True)
            (self._out / _PARTIAL).unlink(missing_ok=True)
            clear(self.checkpoints)
            if self._config.resume is not None:  # else it is another run's
                remove_model(self._out / _INTERRUPTED)
            if interrupt.pending:
                cause = exception_of(interrupt.pending)
                word = str(cause) or "interrupted"
                raise KeptInterrupt(f"{word}; the result is saved in {self._out}") from cause

    def _with_pace(self, history: Iterable[Mapping[str, float]]) -> History:
        """The result's numbers, and the pace of each step, of which the lines written then tell."""
        path, paces = self._out / _PARTIAL, {}
        for line in path.read_bytes().splitlines() if path.exists() else ():
            with suppress(ValueError):  # a line that a crash has torn
                told = json.loads(line)
                paces[told["step"]] = {name: told[name] for name in PACE if name in told}
        return History({**record, **paces.get(record["step"], {})} for record in history)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            self._end(error)
        finally:
            self._unlock()

    def _end(self, error: BaseException | None) -> None:
        if self._history is not None:
            self._history.close()
        result = getattr(error, "result", None)
        if error is None or result is None or not self._leader:
            return
        kept = self._out / _INTERRUPTED
        with DeferredInterrupt():
            self._keep(kept, result)
        where = f"the state after {len(result.history)} steps is kept in {kept}"
        if resumable := self._resumable():
            where += f"; {resumable}"
        if isinstance(error, KeyboardInterrupt):
            raise KeptInterrupt(f"interrupted; {where}") from error
        raise Kept(f"{error}; {where}") from error

    def _resumable(self) -> str:
        """What goes on from the newest checkpoint; "" without any."""
        steps = steps_in(self.checkpoints)
        return f"--resume latest goes on from step {steps[-1]}" if steps else ""
