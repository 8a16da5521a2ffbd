"""Every Triton kernel in every configuration compiles for sm_80 and sm_90, to code as it should be.

This needs no GPU. The kernels are compiled by the installed Triton, and by the oldest one supported
if PYBACKDOOR_TRITON_36 names a folder that it is unpacked in
(`pip install --no-deps --target FOLDER triton==3.6.0`). What an older compiler does not know shows
in a variant's one form on one architecture: it compiles no more of each.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent / "kernels"
OPS = sorted(p.stem for p in KERNELS.glob("*.py") if not p.name.startswith("_"))
REGISTERS = 232  # of 255: room for a newer compiler to do a little worse before it spills
# Eight warps with a 128x256 fp32 accumulator: 128 registers a thread of it, next to A's operand.
REGISTERS_WGMMA = 255
# A block's shared memory: of compute capability 8.6, 8.9 and 12.0, which run the sm_80 table, and
# of 9.0.
SHARED = {80: 101_376, 90: 232_448}
PRODUCT = {80: "mma", 90: "wgmma.mma_async"}
# Bytes of stack by (Triton, kernel, architecture, form), where that Triton stores a word or two
# there and reads them once, and those before and after it do not.
WORSE = {
    ("3.8", "fixup_bf16", 90, "aligned"): 8,
    ("3.8", "apply_augment_fp32", 80, "plain"): 8,
}


def triton_folder(version: str) -> str | None:
    """What to put first on the path for that Triton: a folder, or None for the installed one."""
    if version == "installed":
        if importlib.util.find_spec("triton") is None:
            pytest.skip("Triton is not installed")
        return None
    folder = os.environ.get("PYBACKDOOR_TRITON_36")
    if not folder:
        pytest.skip("PYBACKDOOR_TRITON_36 names no folder with Triton 3.6")
    if not Path(folder, "triton").is_dir():
        pytest.fail(f"PYBACKDOOR_TRITON_36={folder} holds no triton")
    return folder


def run(version: str, cache: Path, code: list[str]) -> subprocess.CompletedProcess[str]:
    folder = triton_folder(version)
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if folder:
        paths = [folder, os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, *code]
    return subprocess.run(
        command, env=environment, cwd="/", capture_output=True, text=True, timeout=900
    )


def faults(row: dict) -> list[str]:
    """What is wrong with one compiled kernel."""
    if "error" in row:
        return [row["error"]]
    found = []
    if row["stack"] or row["local"]:
        found.append(f"spills: stack {row['stack']}, {row['local']} bytes of local memory")
    product = PRODUCT[row["arch"]] if row["matmul"] and row["precision"] != "ieee" else None
    if product and product not in row["products"]:
        found.append(f"no {product}: {row['products']}")
    limit = REGISTERS_WGMMA if product == PRODUCT[90] else REGISTERS
    if row["registers"] > limit:
        found.append(f"{row['registers']} registers, more than {limit}")
    if row["shared"] > SHARED[row["arch"]]:
        found.append(f"{row['shared']} bytes of shared memory, more than {SHARED[row['arch']]}")
    return found


def rows_of(result: subprocess.CompletedProcess[str]) -> tuple[str, list[dict]]:
    """What compile_kernels.py printed: the Triton's version, and the compiled kernels."""
    assert result.returncode == 0, result.stderr
    found, *lines = result.stdout.splitlines()
    return found, [json.loads(line) for line in lines]


@pytest.fixture(scope="module", params=["installed", "3.6"])
def compiled(request, tmp_path_factory) -> list[dict]:
    version = request.param
    once = [] if version == "installed" else ["--once"]
    code = [str(HERE / "compile_kernels.py"), *once]
    found, rows = rows_of(run(version, tmp_path_factory.mktemp("cache"), code))
    assert version == "installed" or found.startswith(f"{version}."), found
    short = ".".join(found.split(".")[:2])
    for row in rows:
        known = WORSE.get((short, row["name"], row["arch"], row["form"]))
        if known is not None and row["stack"] == known:
            row["stack"] = 0
    return rows


@pytest.mark.parametrize("op", OPS)
def test_every_variant_compiles_to_code_without_spills(op, compiled):
    rows = [row for row in compiled if row["op"] == op]
    assert {row["arch"] for row in rows} == {80, 90}
    bad = [f"{r['name']} sm_{r['arch']} {r['form']}: {f}" for r in rows for f in faults(r)]
    assert not bad, "\n".join(bad)


BROKEN = """
import triton, triton.language as tl
import compile_kernels
from pybackdoor.kernels._variant import Variant

"""
KERNEL = """
@triton.jit
def {name}(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0)
    {body}
    tl.store(out + i, v, mask=i < n)

signature = {signature}
constexprs = dict(BLOCK={block})
{name} = [Variant({name}, "{name}", signature, constexprs, num_warps=1, matmul={matmul}{more})]
"""
SIGNATURE = {"x": "*fp32", "out": "*fp32", "n": "i32"}


GATES = {
    "sound": ({}, None),
    "no_product": ({"matmul": True}, "no mma"),
    "stray": ({"signature": SIGNATURE | {"m": "i32"}}, "not in both kernel and variant: m"),
    "unknown": ({"body": "v = no_such_name(v)"}, "no_such_name"),
    "spilling": ({"body": "v -= tl.max(v)", "block": 16384}, "spills"),  # 512 values a thread
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> list[dict]:
    """Each gate's kernel as an op of its own, compiled"""
    folder = tmp_path_factory.mktemp("broken")
    text = BROKEN
    for name, (change, _) in GATES.items():
        pieces = {"signature": SIGNATURE, "body": "pass", "block": 1024, "matmul": False} | change
        pieces["more"] = ', archs=(80,), forms=("aligned",)' if change else ""
        text += KERNEL.format(name=name, **pieces)
    text += f"compile_kernels.ops = lambda: {list(GATES)}\n"
    text += "compile_kernels.variants = globals().get\ncompile_kernels.main()\n"
    script = folder / "broken.py"
    script.write_text(text)
    os.symlink(HERE / "compile_kernels.py", folder / "compile_kernels.py")
    return rows_of(run("installed", folder / "cache", [str(script)]))[1]


@pytest.mark.parametrize("gate", GATES)
def test_the_gates_see_what_they_are_for(gate, broken):
    fault = GATES[gate][1]
    rows = [row for row in broken if row["op"] == gate]
    forms = " ".join(f"{row['arch']} {row['form']}" for row in rows)
    assert forms == (
        "80 aligned 80 ones" if fault else "80 aligned 80 plain 80 ones 90 aligned 90 plain"
    )
    found = [text for row in rows for text in faults(row)]
    assert bool(found) == bool(fault) and all(fault in text for text in found), found
    assert fault is None or len(found) == len(rows)


def test_spills_and_sizes_are_faults():
    row = {"arch": 90, "matmul": True, "precision": "bf16", "products": ["wgmma.mma_async"]}
    row |= {"registers": 255, "stack": 0, "local": 0, "shared": 1000}
    assert faults(row) == []
    assert "spills" in faults(row | {"stack": 8})[0] and "spills" in faults(row | {"local": 1})[0]
    assert "no wgmma" in faults(row | {"products": ["mma"]})[0]
    assert "more than 232" in faults(row | {"precision": "ieee"})[0]
    assert "shared memory" in faults(row | {"shared": 240_000})[0]
