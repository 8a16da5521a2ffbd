"""Catches what a Triton launcher launches, without a GPU, and finds the variant it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": None}  # with Triton's defaults


def type_of(value: Any) -> str:
    """The Triton type of an argument."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is no argument of a kernel")
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def matching(kernel: Any, values: dict[str, Any], options: dict[str, Any], variants: list) -> list:
    """The variants of that kernel which the launch is one of."""
    return [
        v
        for v in variants
        if v.kernel is kernel
        and {n: type_of(values[n]) for n in v.signature} == v.signature
        and {n: values[n] for n in v.constexprs} == v.constexprs
        and set(v.signature) | set(v.constexprs) == set(values)
        and (v.num_warps, v.num_stages, v.fp_fusion) == tuple(options.values())
    ]


@contextmanager
def caught(variants: list) -> Iterator[list[tuple[Any, tuple[int, ...]]]]:
    """Launches run nothing: each is looked up in the variants, and listed with its grid.

    Raises:
        AssertionError: a launch is none of the variants, or its grid is empty or too large.
    """
    found: list[tuple[Any, tuple[int, ...]]] = []

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        options = {n: named.pop(n, default) for n, default in OPTIONS.items()}
        bound = kernel.signature.bind(*arguments, **named)
        values = dict(bound.arguments)
        variant = matching(kernel, values, options, variants)
        shown = {n: type_of(x) if isinstance(x, torch.Tensor) else x for n, x in values.items()}
        assert variant, f"{kernel.__name__} is launched as no variant: {shown}, {options}"
        assert all(0 < n < 2**31 for n in grid) and all(n < 2**16 for n in grid[1:]), grid
        found.append((variant[0], grid))

    with mock.patch.object(JITFunction, "run", run):
        yield found
