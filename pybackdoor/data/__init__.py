"""Data sets of images with captions or labels, decoded once, and the loader over them.

Importing this starts neither Pillow nor open_clip; the functions that need them do.
"""

from .arrays import labelled_from_arrays, pairs_from_arrays
from .decode import decode_image
from .indexed import default_cache_dir
from .ledger import BadRow, Ledger
from .loader import PairLoader
from .ondemand import OnDemandImages
from .pairs import Labelled, Pairs, pairs_from_labelled
from .parquet import pairs_from_hf, pairs_from_parquet
from .preprocess import BrokenImage, Preprocessing
from .procedural import procedural_pairs
from .remote import Retry
from .shards import pairs_from_shards
from .sources import (
    labelled_from_csv,
    labelled_from_folder,
    pairs_from_csv,
    pairs_from_folder,
)
from .store import ArrayImages, ImageStore, Overlay
from .strings import Strings
from .templates import TEMPLATES, read_classes, resolve_templates

__all__ = [
    "TEMPLATES",
    "ArrayImages",
    "BadRow",
    "BrokenImage",
    "ImageStore",
    "Labelled",
    "Ledger",
    "OnDemandImages",
    "Overlay",
    "PairLoader",
    "Pairs",
    "Preprocessing",
    "Retry",
    "Strings",
    "decode_image",
    "default_cache_dir",
    "labelled_from_arrays",
    "labelled_from_csv",
    "labelled_from_folder",
    "pairs_from_arrays",
    "pairs_from_csv",
    "pairs_from_folder",
    "pairs_from_hf",
    "pairs_from_labelled",
    "pairs_from_parquet",
    "pairs_from_shards",
    "procedural_pairs",
    "read_classes",
    "resolve_templates",
]
