"""Matrix products on the CPU by the library that is fastest there.

PyTorch's fp32 matmul calls MKL, which is the faster one on Intel's CPUs, and on others' may be the
slower one; the ablation of bench_clean.py tells what that makes of a step. The CPU's maker decides,
not a clock: results must not depend on one. oneDNN's error is at most twice as large (root mean
square, which the tests hold it to; the larger with AVX2). It is called per product: the global
matmul precision, which can turn fp32 into bf16, stays alone.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

_aten = torch.ops.aten
# Multiplications: on smaller products oneDNN gains little.
_LARGE = 1 << 25
_WIDE = 256  # a model without weights that wide has no large product


@cache
def _onednn():  # -> the op, or None where torch has been built without it
    if not torch.backends.mkldnn.is_available():
        return None
    op = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if op is None:
        return None
    x = torch.tensor([[1.0, 2.0]], device="cpu")
    try:
        works = op(x, x, None, "none", [], "").item() == 5
    except RuntimeError:
        return None
    return op if works else None


@cache
def _intel() -> bool:
    try:
        maker = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        maker = platform.processor()
    return "GenuineIntel" in maker and torch.backends.mkl.is_available()


def _faster():  # -> oneDNN's op, or None where torch's own products are as fast
    return None if _intel() or not torch.backends.mkldnn.enabled else _onednn()


def matmul_nt(
    a: Tensor,  # [m, k], any strides
    b: Tensor,  # [n, k], any strides
) -> Tensor:
    """a bᵀ, [m, n]: for fp32 on a CPU by the faster library, else torch.mm."""
    if _plain(a) and _plain(b) and min(a.shape + b.shape) > 0:
        op = _faster()
        if op is not None:
            return op(a, b, None, "none", [], "")
    return a @ b.T


@contextmanager
def fast_products(model: nn.Module) -> Iterator[None]:
    """Within it, a CPU model's large fp32 products with a row-major left factor go to oneDNN.

    On Intel's CPUs nothing changes. Those are the forward pass of linear layers and the gradients
    of their inputs. The gradients of weights, whose left factor is transposed, are no faster there.
    Entered once for a step: seeing every operator has a cost, so nothing is done for models whose
    products are small, nor within another dispatch mode, which would see other operators than it
    expects.
    """
    op = _faster()
    wide = any(p.ndim == 2 and min(p.shape) >= _WIDE and _plain(p) for p in model.parameters())
    if op is None or not wide or _get_current_dispatch_mode() is not None:
        yield
        return
    with _LargeProducts(op):
        yield


class _LargeProducts(TorchDispatchMode):
    supports_higher_order_operators = True  # which are none of its

    def __init__(self, op: Any) -> None:
        super().__init__()
        self._op = op

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if kwargs:
            return func(*args, **kwargs)
        if func is _aten.addmm.default and _large(*args[1:]) and args[0].shape == args[2].shape[1:]:
            return self._op(args[1], args[2].T, args[0], "none", [], "")
        if func is _aten.mm.default and _large(*args):
            return self._op(args[0], args[1].T, None, "none", [], "")
        return func(*args)


def _large(
    a: Tensor,  # [m, k]
    b: Tensor,  # [k, n]
) -> bool:
    fit = a.shape[1] == b.shape[0]  # else torch says what is wrong
    large = a.numel() * b.shape[1] >= _LARGE
    return fit and large and a.is_contiguous() and _plain(a) and _plain(b)


def _plain(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.layout == torch.strided
