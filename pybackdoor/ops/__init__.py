"""The ops: each checks its arguments once, chooses a backend and launches it."""

from pybackdoor.ops.adamw_ema import StepStatus, adamw_ema
from pybackdoor.ops.trigger_normalize import Augment, TriggerTable, trigger_normalize

__all__ = ["Augment", "StepStatus", "TriggerTable", "adamw_ema", "trigger_normalize"]
