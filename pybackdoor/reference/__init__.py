"""Every op in plain eager PyTorch: the oracle, the baseline and the last backend."""

from .adamw_ema import adamw_ema, weight_noise
from .contrastive_par import contrastive_par
from .trigger_normalize import (
    augment_decisions,
    augment_normalized,
    noise_normals,
    normalize_table,
    philox_uint32,
    quantize,
    trigger_normalize,
)
from .trigger_normalize_backward import trigger_normalize_backward

__all__ = [
    "adamw_ema",
    "augment_decisions",
    "augment_normalized",
    "contrastive_par",
    "noise_normals",
    "normalize_table",
    "philox_uint32",
    "quantize",
    "trigger_normalize",
    "trigger_normalize_backward",
    "weight_noise",
]
