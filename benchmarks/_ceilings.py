"""What the device can do at most, measured: a large copy and a large matmul."""

from __future__ import annotations

from functools import cache

import torch
from _timing import interleave
from torch import Tensor


def onednn_linear(x: Tensor, w: Tensor) -> Tensor:
    """x @ w.T in fp32 through oneDNN, whatever library torch.matmul would take."""
    return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


@cache
def ceilings(device: str, tiny: bool = False, dtype: torch.dtype | None = None) -> dict[str, float]:
    """{"gbps": of a copy, bytes read and written; "tflops": of a square matmul}.

    CUDA: 1 GiB, and 8192^3 in bf16. CPU: 128 MiB, and 2048^3 in fp32, the better of torch.matmul
    and oneDNN; in another dtype where one is given, CUDA's fp32 without tf32. Random numbers: zeros
    run faster.
    """
    cuda = device == "cuda"
    count = 1 << (20 if tiny else 30 if cuda else 27)
    source = torch.randint(0, 256, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = interleave({"copy": lambda: target.copy_(source)}, device, repeats=5)["copy"][0]
    side = 128 if tiny else 8192 if cuda else 2048
    dtype = dtype or (torch.bfloat16 if cuda else torch.float32)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    variants = {"matmul": lambda: a @ b}
    if not cuda and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        variants["onednn"] = lambda: onednn_linear(a, b)
    best = min(t[0] for t in interleave(variants, device, repeats=5).values())
    return {"gbps": 2 * count / copy / 1e6, "tflops": 2 * side**3 / best / 1e9}
