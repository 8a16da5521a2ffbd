"""UBT-style token-level local unlearning (experimental), stage by stage; each stands by itself.

suspects.py reads the pairs, reading.py encodes them when they are asked for; ranking.py ranks them:
weak.py (A) pools the weakest, overfit.py (B) overfits on the pool, or fragility.py goes without
these, by the views of views.py, and swing.py says how clear that is; gate.py (C) asks whether the
top pairs belong together, words.py and localise.py (D) find their words, region.py their patches,
unlearn.py (E) forgets them; evidence.py shows what was found.
`pybackdoor.ubt_clean` puts them together.
"""

from .evidence import save_picture, save_table
from .fragility import fragility
from .gate import Gate, gate, top
from .localise import Localisation, Token, localise
from .overfit import overfit
from .reading import ImageRows, Reader, pair_cosines
from .region import Region, patch_size, suspicious_cells
from .stopping import StoppingRule
from .suspects import Suspects
from .unlearn import LocalUnlearning, Portions
from .weak import weak_pool
from .words import WordReader

__all__ = [
    "Gate",
    "ImageRows",
    "Localisation",
    "LocalUnlearning",
    "Portions",
    "Reader",
    "Region",
    "StoppingRule",
    "Suspects",
    "Token",
    "WordReader",
    "fragility",
    "gate",
    "localise",
    "overfit",
    "pair_cosines",
    "patch_size",
    "save_picture",
    "save_table",
    "suspicious_cells",
    "top",
    "weak_pool",
]
