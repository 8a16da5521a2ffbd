"""Every op in plain eager PyTorch: the oracle, the baseline and the last backend."""

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

__all__ = [
    "augment_decisions",
    "augment_normalized",
    "contrastive_par",
    "noise_normals",
    "normalize_table",
    "philox_uint32",
    "quantize",
    "trigger_normalize",
]
