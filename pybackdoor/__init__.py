"""Remove backdoors from CLIP models, and prove it."""

from __future__ import annotations

from . import data, models, ops, triggers
from ._build_info import build_info
from .clean import CleanResult
from .engine import NonFiniteError
from .estimates import Estimate
from .evaluate import Evaluation, Verdict, evaluate, verify_trigger
from .losses import ContrastiveLoss
from .manifest import Manifest
from .methods import finetune_clean, par_clean, ubt_clean
from .models import load, save
from .ops import Augment
from .optim import AdamWEma
from .poison import PoisonResult, poison, poison_pairs
from .triggers import TriggerSpec, apply_trigger, trigger

__version__ = "0.1.0"

__all__ = [
    "AdamWEma",
    "Augment",
    "CleanResult",
    "ContrastiveLoss",
    "Estimate",
    "Evaluation",
    "Manifest",
    "NonFiniteError",
    "PoisonResult",
    "TriggerSpec",
    "Verdict",
    "__version__",
    "apply_trigger",
    "build_info",
    "data",
    "evaluate",
    "finetune_clean",
    "load",
    "models",
    "ops",
    "par_clean",
    "poison",
    "poison_pairs",
    "save",
    "trigger",
    "triggers",
    "ubt_clean",
    "verify_trigger",
]
