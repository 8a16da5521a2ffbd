"""Matrix products on the CPU by the library that is fastest there.

PyTorch's fp32 matmul calls MKL, which on other makers' CPUs runs at down to half of oneDNN's speed
at the same error. oneDNN is called per product: the global matmul precision, which can turn fp32
into bf16, stays alone.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def _onednn():  # -> the op, or None where torch has been built without it
    if not torch.backends.mkldnn.is_available():
        return None
    op = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if op is None:
        return None
    x = torch.tensor([[1.0, 2.0]])
    try:
        works = op(x, x, None, "none", [], "").item() == 5
    except RuntimeError:
        return None
    return op if works else None


def matmul_nt(
    a: Tensor,  # [m, k], any strides
    b: Tensor,  # [n, k], any strides
) -> Tensor:
    """a bᵀ, [m, n]: oneDNN for fp32 where torch has it, else torch.mm."""
    if a.dtype == torch.float32 and min(a.shape + b.shape) > 0 and torch.backends.mkldnn.enabled:
        op = _onednn()
        if op is not None:
            return op(a, b, None, "none", [], "")
    return a @ b.T
