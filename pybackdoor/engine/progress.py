"""What people see of a run while it goes on."""

from __future__ import annotations

import os
from pathlib import Path

import torch


class Progress:
    """A bar with the loss, the method's terms, throughput and time left; silent off a terminal."""

    def __init__(
        self, steps: int, wanted: bool | None, leader: bool, done: int, device: torch.device
    ) -> None:
        self._bar, self._device = None, device
        if leader and wanted is not False:
            from tqdm.auto import tqdm

            hidden = None if wanted is None else False  # tqdm: None hides it off a terminal
            self._bar = tqdm(
                total=steps, initial=done, disable=hidden, unit="step", dynamic_ncols=True
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, record: dict[str, float], pairs_per_second: float, waiting: float) -> None:
        """One step more; waiting is the share of the time that the loader kept it waiting."""
        if self._bar is not None and not self._bar.disable:
            shown = {n: f"{v:.3g}" for n, v in record.items()}
            shown |= {"pairs/s": f"{pairs_per_second:.0f}", "data wait": f"{waiting:.0%}"}
            shown |= {"memory": f"{self._memory() / 1e9:.1f} GB"}
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()

    def _memory(self) -> int:
        """Bytes of the device, or of the process on a CPU."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
        except OSError:  # not Linux
            return 0
        return pages * os.sysconf("SC_PAGE_SIZE")

    def back_to(self, step: int) -> None:
        """The run went back to an earlier step."""
        if self._bar is not None:
            self._bar.n = step
            self._bar.refresh()
