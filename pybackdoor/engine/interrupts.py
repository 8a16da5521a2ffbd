"""Ctrl-C and SIGTERM at a whole step: a signal is kept until the work at hand is complete."""

from __future__ import annotations

import signal
import threading
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM came; what Ctrl-C does is done, and a command exits with 143."""


class DeferredInterrupt:
    """Within the block, Ctrl-C and SIGTERM wait for ``check``; a second one interrupts at once.

    Does nothing outside the main thread, where Python delivers no signals.
    """

    def __init__(self) -> None:
        self._pending: int | None = None
        self._previous: dict[int, object] = {}
        self._active = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> DeferredInterrupt:
        if self._active:
            for number in _SIGNALS:
                self._previous[number] = signal.getsignal(number)
                signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous or signal.SIG_DFL)  # type: ignore[arg-type]

    @property
    def pending(self) -> int:
        """The number of the signal that waits; 0 for none."""
        return self._pending or 0

    def check(self) -> None:
        """Raise what the signal asks for if one came since the block began."""
        if self._pending is not None:
            number, self._pending = self._pending, None
            raise exception_of(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._pending is not None:
            raise exception_of(number)
        self._pending = number


def exception_of(number: int) -> KeyboardInterrupt:
    """What a signal raises."""
    return Terminated("terminated") if number == signal.SIGTERM else KeyboardInterrupt()
