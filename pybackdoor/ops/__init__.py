"""The ops: each checks its arguments once, chooses a backend and launches it."""

from pybackdoor.ops.adamw_ema import StepStatus, adamw_ema
from pybackdoor.ops.contrastive_par import ContrastivePar, contrastive_par
from pybackdoor.ops.trigger_normalize import Augment, TriggerTable, trigger_normalize

__all__ = [
    "Augment",
    "ContrastivePar",
    "StepStatus",
    "TriggerTable",
    "adamw_ema",
    "contrastive_par",
    "trigger_normalize",
]
