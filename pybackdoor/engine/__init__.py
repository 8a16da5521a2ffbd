"""Training, whatever for: an objective and a schedule make a method of it.

loop.py walks the steps, gradients.py computes one, guard.py keeps what is not finite from being
applied, feed.py reads the batches, checkpoints.py keeps the state of a run, towers.py encodes,
texts.py and images.py keep what a frozen model has encoded, heap.py what a step has freed.
"""

from .checkpoints import Checkpoints
from .contrastive import Contrastive
from .faults import NonFiniteError
from .groups import decay_groups
from .heap import kept_heap
from .interrupts import DeferredInterrupt
from .loop import train
from .objective import Frozen, Given, Objective, Preparation
from .settings import (
    PRECISIONS,
    Schedule,
    Settings,
    StepHook,
    Tracker,
    TrainLog,
    loss_precision,
    pick_device,
    pick_precision,
)
from .shortcuts import copied
from .towers import Captions, Encoder, TextTrim

__all__ = [
    "PRECISIONS",
    "Captions",
    "Checkpoints",
    "Contrastive",
    "DeferredInterrupt",
    "Encoder",
    "Frozen",
    "Given",
    "NonFiniteError",
    "Objective",
    "Preparation",
    "Schedule",
    "Settings",
    "StepHook",
    "TextTrim",
    "Tracker",
    "TrainLog",
    "copied",
    "decay_groups",
    "kept_heap",
    "loss_precision",
    "pick_device",
    "pick_precision",
    "train",
]
