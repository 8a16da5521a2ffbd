"""Compiles the Triton kernels ahead of time, without a GPU, and tells what became of them.

    python compile_kernels.py [--op OP] [--once] [--jobs N] [--table]

Every variant of every module under pybackdoor.kernels is compiled for each of its architectures,
in the forms that a launch can specialise it to, and what became of it is read back. --once compiles
each variant in one form for one architecture, of neighbours another one. It prints the Triton
version on the first line, then one JSON object for each compilation; --table is for people.
Run it with TRITON_CACHE_DIR set and without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import pybackdoor.kernels

PRODUCT = re.compile(r"\b(wgmma\.mma_async|mma)\.sync\b")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def ops() -> list[str]:
    names = (m.name for m in pkgutil.iter_modules(pybackdoor.kernels.__path__))
    return sorted(n for n in names if not n.startswith("_"))


@cache
def variants(op: str) -> list[Any]:
    return importlib.import_module(f"pybackdoor.kernels.{op}").variants()


def specialised(variant: Any) -> list[str]:
    """The arguments that Triton compiles anew for when they are divisible by 16, or are 1."""
    return [
        p.name
        for p in variant.kernel.params
        if not p.is_constexpr
        and not p.do_not_specialize
        and variant.signature[p.name][0] in "*iu"
        and variant.signature[p.name] != "i1"
    ]


def forms(op: str, variant: Any) -> list[str]:
    """aligned: pointers and sizes divisible by 16; plain: none is. ones: each size is 1.

    A size of 1 becomes a constant, which changes the code's types and no more: the first variant
    of each kernel is compiled so.
    """
    arguments = specialised(variant)
    found = variant.forms if arguments else ("aligned",)
    sizes = [a for a in arguments if variant.signature[a][0] != "*"]
    first = next(v for v in variants(op) if v.kernel is variant.kernel)
    return [*found, "ones"] if sizes and variant is first else found


@cache
def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def source(variant: Any, form: str) -> ASTSource:
    arguments = variant.kernel.arg_names
    stray = set(arguments) ^ (set(variant.signature) | set(variant.constexprs))
    if stray:
        raise TypeError(f"arguments not in both kernel and variant: {', '.join(sorted(stray))}")
    constants, attrs = dict(variant.constexprs), {}
    for name in specialised(variant):
        pointer = variant.signature[name][0] == "*"
        if form == "ones" and not pointer:
            constants[name] = 1
        elif form == "aligned" or (form == "ones" and pointer):
            attrs[(arguments.index(name),)] = [["tt.divisibility", 16]]
    signature = {n: "constexpr" if n in constants else variant.signature[n] for n in arguments}
    constexprs = {(arguments.index(n),): value for n, value in constants.items()}
    return ASTSource(fn=variant.kernel, signature=signature, constexprs=constexprs, attrs=attrs)


def inspect(asm: dict[str, Any]) -> dict[str, Any]:
    """Registers, stack, shared and local memory of the machine code; the products of its PTX.

    Disassembling would take longer than compiling, and show no more: a product of the PTX has one
    instruction each, and whatever spills has a stack or local memory.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [tool("cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = USAGE.search(text)
    if usage is None:
        raise RuntimeError(f"cuobjdump did not print the code's resources: {text[:500]}")
    registers, stack, shared, local = map(int, usage.groups())
    return {
        "registers": registers,
        "stack": stack,
        "static_shared": shared,
        "local": local,
        "products": sorted(set(PRODUCT.findall(asm["ptx"]))),
    }


def compile_one(job: tuple[str, int, int, str]) -> dict[str, Any]:
    op, index, arch, form = job
    variant = variants(op)[index]
    row: dict[str, Any] = {"op": op, "name": variant.name, "arch": arch, "form": form}
    row |= {"matmul": variant.matmul, "precision": str(variant.constexprs.get("PRECISION", ""))}
    try:
        compiled = triton.compile(
            source(variant, form),
            target=GPUTarget("cuda", arch, 32),
            options={
                "num_warps": variant.num_warps,
                "num_stages": variant.num_stages,
                "enable_fp_fusion": variant.fp_fusion,
            },
        )
        return row | {"shared": compiled.metadata.shared} | inspect(compiled.asm)
    except Exception as error:  # what a kernel can fail with is the compiler's own affair
        return row | {"error": f"{type(error).__name__}: {error}"[-1500:]}


def jobs(op: str, once: bool) -> list[tuple[str, int, int, str]]:
    found = []
    for index, variant in enumerate(variants(op)):
        archs, kinds = variant.archs, forms(op, variant)
        if once:
            archs, kinds = (archs[index % len(archs)],), kinds[:1]
        # What a constant does to the code's types it does on either architecture.
        found += [
            (op, index, arch, form)
            for arch in archs
            for form in kinds
            if form != "ones" or arch == archs[0]
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", help="only this op")
    parser.add_argument("--once", action="store_true", help="each variant a single time")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    wanted = [options.op] if options.op else ops()
    todo = [job for op in wanted for job in jobs(op, options.once)]
    print(triton.__version__)
    with ProcessPoolExecutor(options.jobs) as pool:
        for row in pool.map(compile_one, todo):
            if options.table:
                rest = ("registers", "stack", "local", "shared", "products", "error")
                values = " ".join(f"{k}={row[k]}" for k in rest if row.get(k))
                print(f"{row['op']}.{row['name']:40} {row['arch']} {row['form']:8} {values}")
            else:
                print(json.dumps(row))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
