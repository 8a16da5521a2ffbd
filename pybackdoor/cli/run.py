"""A training command's output folder: what is there before, during and after, come what may."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from ..distributed import Ranks
from ..engine import DeferredInterrupt
from ..files import hold, writable_folder, write_atomically
from ..options import UsageError, write_yaml
from ..plots import training_curves

_PARTIAL, _HISTORY = "history.partial.jsonl", "history.jsonl"


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
        config: saved as ``config.yaml`` after the first step.
        out: the output folder; must not be the input model's.
        keep: (folder, result) saves a result.
    """

    def __init__(
        self, config: Any, out: str, model: str, keep: Callable[[Path, Any], None]
    ) -> None:
        folder = Path(out)
        if folder.exists() and Path(model.removeprefix("local-dir:")).exists():
            if os.path.samefile(folder, model.removeprefix("local-dir:")):
                raise UsageError(f"--out must not be the input model's own folder, got {out}")
        self._leader = Ranks().rank == 0
        self.checkpoints = folder / "checkpoints"
        self._out, self._keep, self._config = folder, keep, config
        self._history: TextIO | None = None
        self._lock: TextIO | None = None

    def __enter__(self) -> Run:
        if self._leader:
            self._lock = hold(writable_folder(self._out))
        return self

    def _begin(self, step: int) -> None:
        """The first step is done: nothing of another run is touched before."""
        write_yaml(self._config, self._out / "config.yaml")
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
        if self._leader:
            with DeferredInterrupt() as interrupt:
                self._keep(self._out, result)
                lines = "".join(json.dumps(record) + "\n" for record in result.history)
                write_atomically(self._out / _HISTORY, lines.encode())
                training_curves(result.history, self._out / "training.png")
                (self._out / _PARTIAL).unlink(missing_ok=True)
                shutil.rmtree(self.checkpoints, ignore_errors=True)
                interrupt.check()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            self._end(error)
        finally:
            if self._lock is not None:
                self._lock.close()

    def _end(self, error: BaseException | None) -> None:
        if self._history is not None:
            self._history.close()
        result = getattr(error, "result", None)
        if error is None or result is None or not self._leader:
            return
        kept = self._out / "interrupted"
        with DeferredInterrupt():
            self._keep(kept, result)
        where = f"the state after {len(result.history)} steps is kept in {kept}"
        if self.checkpoints.exists():
            where += "; --resume latest goes on from there"
        if isinstance(error, KeyboardInterrupt):
            raise KeptInterrupt(f"interrupted; {where}") from error
        raise Kept(f"{error}; {where}") from error
