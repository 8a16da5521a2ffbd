"""CLIP models: the protocol they follow, and reading and writing them without executing anything.

open_clip and transformers are imported only when one of their models is loaded.
"""

from .checkpoint import read_checkpoint
from .hf import HFClip
from .load import LoadedModel, create, load, preprocess_record
from .openclip import is_architecture
from .preprocess import Preprocess
from .protocol import (
    check_clip,
    check_finite,
    image_features,
    logit_scale_parameters,
    nonfinite_weights,
    scale,
    text_features,
    weights_sha256,
)
from .save import MANIFEST, refuse_folder, save
from .seen import TextTower
from .seen_towers import image_tower, text_tower
from .sniff import CheckpointError
from .tokenizer import Tokenizer

__all__ = [
    "MANIFEST",
    "CheckpointError",
    "HFClip",
    "LoadedModel",
    "Preprocess",
    "TextTower",
    "Tokenizer",
    "check_clip",
    "check_finite",
    "create",
    "image_features",
    "image_tower",
    "is_architecture",
    "load",
    "logit_scale_parameters",
    "nonfinite_weights",
    "preprocess_record",
    "read_checkpoint",
    "refuse_folder",
    "save",
    "scale",
    "text_features",
    "text_tower",
    "weights_sha256",
]
