"""Find what was poisoned: training pairs, by how suspicious they are.

neighbours.py finds the nearest images, scores.py has the formulas and the table of all methods
(fragility's own is `pybackdoor.ubt.fragility`), reading.py reads and encodes the pairs, samples.py
puts them together; metrics.py and truth.py judge scores by what is known to be planted.
"""

from .metrics import auroc, precision_at, recall_at
from .neighbours import Neighbours, nearest
from .samples import DetectionResult, detect_samples
from .scores import METHODS, similarity_gain
from .truth import planted

__all__ = [
    "METHODS",
    "DetectionResult",
    "Neighbours",
    "auroc",
    "detect_samples",
    "nearest",
    "planted",
    "precision_at",
    "recall_at",
    "similarity_gain",
]
