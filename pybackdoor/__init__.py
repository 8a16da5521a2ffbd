"""Remove backdoors from CLIP models, and prove it."""

from __future__ import annotations

from . import data, detect, models, ops, triggers
from ._build_info import build_info
from .clean import CleanResult
from .detect import DetectionResult, detect_samples
from .engine import NonFiniteError
from .estimates import Estimate
from .evaluate import Evaluation, Verdict, evaluate, verify_trigger
from .finetune import finetune_clean
from .losses import ContrastiveLoss
from .manifest import Manifest
from .models import load, save
from .ops import Augment
from .optim import AdamWEma
from .par import par_clean
from .poison import PoisonResult, poison, poison_pairs
from .triggers import TriggerSpec, apply_trigger, trigger

__version__ = "0.1.0"

__all__ = [
    "AdamWEma",
    "Augment",
    "CleanResult",
    "ContrastiveLoss",
    "DetectionResult",
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
    "detect",
    "detect_samples",
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
    "verify_trigger",
]
