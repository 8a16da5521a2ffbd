"""What people see of a run while it goes on."""

from __future__ import annotations

import os
import time
from collections import deque
from pathlib import Path

import torch

from .settings import TrainLog

PACE = ("pairs_per_second", "data_wait", "memory_gb")
_RECENT = 20  # steps that the pace is that of: a step's own depends on when its numbers arrive
_LOOK = 1.0  # seconds between two looks at the memory: one takes a tenth of a millisecond on a GPU


class Progress:
    """The pace of a run, and a bar with it, the loss, the method's terms and the time left.

    The bar is silent off a terminal, unless it is wanted.

    Args:
        leader: whether this rank shows it.
        log: of the run, which has all numbers of a step before it is told here.
    """

    def __init__(
        self, steps: int, wanted: bool | None, leader: bool, device: torch.device, log: TrainLog
    ) -> None:
        self._bar, self._device, self._log = None, device, log
        self._marks = deque([self._mark()], maxlen=_RECENT + 1)
        self._looked, self._memory = -_LOOK, 0
        if leader and wanted is not False:
            from tqdm.auto import tqdm

            hidden = None if wanted is None else False  # tqdm: None hides it off a terminal
            self._bar = tqdm(
                total=steps, initial=len(log.steps), disable=hidden, unit="step",
                dynamic_ncols=True,
            )  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, record: dict[str, float]) -> dict[str, float]:
        """One step more.

        Returns:
            PACE: pairs a second and the share of the time that the loader kept the run waiting,
            both over the last 20 steps, and GB of memory: of the process on a CPU, the most so far
            of the device.
        """
        self._marks.append(self._mark())
        first, last = self._marks[0], self._marks[-1]
        seconds, pairs, waiting = (b - a for a, b in zip(first, last, strict=True))
        seconds = max(seconds, 1e-9)
        if time.monotonic() - self._looked >= _LOOK:
            self._looked, self._memory = time.monotonic(), memory(self._device)
        pace = pairs / seconds, waiting / seconds, self._memory / 1e9
        if self._bar is not None and not self._bar.disable:
            shown = {n: f"{v:.3g}" for n, v in record.items()}
            shown |= {"pairs/s": f"{pace[0]:.0f}", "data wait": f"{pace[1]:.0%}"}
            shown |= {"memory": f"{pace[2]:.1f} GB"}
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()
        return dict(zip(PACE, pace, strict=True))

    def _mark(self) -> tuple[float, int, float]:
        return self._log.seconds, self._log.pairs, self._log.waiting

    def go_back(self) -> None:
        """The log went back to an earlier step."""
        self._marks.clear()
        self._marks.append(self._mark())
        if self._bar is not None:
            self._bar.n = len(self._log.steps)
            self._bar.refresh()


def memory(device: torch.device) -> int:
    """Bytes: the most so far of a GPU, those of the process now on a CPU; 0 where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
