"""What a Triton kernel is compiled as: every launcher lists the variants it can choose."""

from __future__ import annotations

from typing import Any, NamedTuple


class Variant(NamedTuple):
    """One kernel with one choice of its compile-time arguments.

    Attributes:
        kernel: the jit function.
        name: unique among the op's variants.
        signature: argument name -> Triton type ("*fp32", "i32", ...); constexprs are left out.
        constexprs: argument name -> value.
        num_warps, num_stages: as launched.
        archs: compute capabilities it is launched on, of 80 and 90.
        matmul: contains a tensor-core product; tested to compile to HMMA or HGMMA.
        fp_fusion: False where products and sums must be rounded separately.
    """

    kernel: Any
    name: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    archs: tuple[int, ...] = (80, 90)
    matmul: bool = False
    fp_fusion: bool = True
