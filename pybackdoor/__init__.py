"""Remove backdoors from CLIP models, and measure what is left."""

from __future__ import annotations

from . import data, detect, models, ops, triggers
from ._build_info import build_info
from .badclip import BadClipPatch, badclip_patch
from .clean import CleanResult
from .detect import DetectionResult, detect_samples
from .engine import NonFiniteError
from .estimates import Estimate
from .evaluate import Evaluation, Verdict, evaluate, verify_trigger
from .losses import ContrastiveLoss
from .manifest import Manifest
from .methods import (
    cleanclip_clean,
    finetune_clean,
    ft_sam_clean,
    invert_clean,
    par_clean,
    roclip_clean,
    ubt_clean,
)
from .methods.ubt import UbtResult
from .models import load, save
from .ops import Augment
from .optim import AdamWEma
from .poison import PoisonResult, poison, poison_pairs
from .repair import RepairResult, repair_drift
from .triggers import TriggerSpec, apply_trigger, trigger

__version__ = "0.1.0"

__all__ = [
    "AdamWEma",
    "Augment",
    "BadClipPatch",
    "CleanResult",
    "ContrastiveLoss",
    "DetectionResult",
    "Estimate",
    "Evaluation",
    "Manifest",
    "NonFiniteError",
    "PoisonResult",
    "RepairResult",
    "TriggerSpec",
    "UbtResult",
    "Verdict",
    "__version__",
    "apply_trigger",
    "badclip_patch",
    "build_info",
    "cleanclip_clean",
    "data",
    "detect",
    "detect_samples",
    "evaluate",
    "finetune_clean",
    "ft_sam_clean",
    "invert_clean",
    "load",
    "models",
    "ops",
    "par_clean",
    "poison",
    "poison_pairs",
    "repair_drift",
    "roclip_clean",
    "save",
    "trigger",
    "triggers",
    "ubt_clean",
    "verify_trigger",
]
