"""What a Triton kernel is compiled as: every launcher lists the variants it can choose."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch


class Variant(NamedTuple):
    """One kernel with one choice of its compile-time arguments.

    Attributes:
        kernel: the jit function.
        name: unique among the op's variants.
        signature: argument name -> Triton type ("*fp32", "i32", ...); constexprs are left out.
        constexprs: argument name -> value.
        num_warps, num_stages: as launched.
        archs: compute capabilities it is launched on, of 80 and 90.
        matmul: contains a tensor-core product; tested to compile to mma or wgmma.
        fp_fusion: False where products and sums must be rounded separately.
        forms: what its arguments can be at run time, see tests/compile_kernels.py: "aligned",
            pointers and specialised sizes are multiples of 16; "plain", none is.
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
    forms: tuple[str, ...] = ("aligned", "plain")


@cache
def arch_of(device: torch.device) -> int:
    """Whose table of configurations a device takes: 90 for Hopper, 80 for all else.

    A CPU, which runs kernels in Triton's interpreter, takes 80's.
    """
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return 90 if hopper else 80
