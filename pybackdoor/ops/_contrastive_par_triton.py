"""The memory-bound stages by Triton: _contrastive_par_native's, for a GPU that cannot run those."""

from pybackdoor.kernels.contrastive_par_factors import close, finalise, sums, totals
from pybackdoor.kernels.contrastive_par_fix import fixup, lse
from pybackdoor.kernels.contrastive_par_rows import normalize_backward, prep

__all__ = ["close", "finalise", "fixup", "lse", "normalize_backward", "prep", "sums", "totals"]
