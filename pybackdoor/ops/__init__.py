"""The ops: each checks its arguments once, chooses a backend and launches it."""

from pybackdoor.ops.trigger_normalize import Augment, TriggerTable, trigger_normalize

__all__ = ["Augment", "TriggerTable", "trigger_normalize"]
