"""Every Triton kernel in every configuration compiles for sm_80 and sm_90, to code as it should be.

This needs no GPU. The kernels are compiled by the installed Triton, and by the oldest one supported
if PYBACKDOOR_TRITON_36 names a folder that it is unpacked in
(`pip install --no-deps --target FOLDER triton==3.6.0`).
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
PRODUCT = {80: "HMMA", 90: "HGMMA"}


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
        found.append(f"spills: stack {row['stack']}, {row['local']} accesses of local memory")
    product = PRODUCT[row["arch"]] if row["matmul"] and row["precision"] != "ieee" else None
    if product and product not in row["products"]:
        found.append(f"no {product}: {row['products']}")
    limit = REGISTERS_WGMMA if product == "HGMMA" else REGISTERS
    if row["registers"] > limit:
        found.append(f"{row['registers']} registers, more than {limit}")
    if row["shared"] > SHARED[row["arch"]]:
        found.append(f"{row['shared']} bytes of shared memory, more than {SHARED[row['arch']]}")
    return found


@pytest.mark.parametrize("version", ["installed", "3.6"])
@pytest.mark.parametrize("op", OPS)
def test_every_variant_compiles_to_code_without_spills(op, version, tmp_path):
    result = run(version, tmp_path, [str(HERE / "compile_kernels.py"), "--op", op])
    assert result.returncode == 0, result.stderr
    found, *lines = result.stdout.splitlines()
    assert version == "installed" or found.startswith(f"{version}."), found
    rows = [json.loads(line) for line in lines]
    assert {row["arch"] for row in rows} == {80, 90}
    bad = [f"{r['name']} sm_{r['arch']} {r['form']}: {f}" for r in rows for f in faults(r)]
    assert not bad, "\n".join(bad)


BROKEN = """
import sys
import triton, triton.language as tl
from compile_kernels import compile_one, variants
import compile_kernels
from pybackdoor.kernels._variant import Variant

@triton.jit
def copy(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0)
    {body}
    tl.store(out + i, v, mask=i < n)

signature = {signature}
variant = Variant(copy, "copy", signature, dict(BLOCK={block}), num_warps=1, matmul={matmul})
compile_kernels.variants = lambda op: [variant]
import json
for form in compile_kernels.forms("op", variant):
    print(json.dumps(compile_one(("op", 0, 80, form))))
"""
SIGNATURE = {"x": "*fp32", "out": "*fp32", "n": "i32"}


@pytest.mark.parametrize(
    "change, fault",
    [
        ({}, None),
        ({"matmul": True}, "no HMMA"),
        ({"signature": SIGNATURE | {"m": "i32"}}, "not in both kernel and variant: m"),
        ({"body": "v = no_such_name(v)"}, "no_such_name"),
        ({"body": "v -= tl.max(v)", "block": 16384}, "spills"),  # 512 values a thread
    ],
)
def test_the_gates_see_what_they_are_for(change, fault, tmp_path):
    pieces = {"signature": SIGNATURE, "body": "pass", "block": 1024, "matmul": False} | change
    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(**pieces))
    os.symlink(HERE / "compile_kernels.py", tmp_path / "compile_kernels.py")
    result = run("installed", tmp_path / "cache", [str(script)])
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["form"] for row in rows] == ["aligned", "plain", "ones"]
    found = [text for row in rows for text in faults(row)]
    assert bool(found) == bool(fault) and all(fault in text for text in found), found


def test_spills_and_sizes_are_faults():
    row = {"arch": 90, "matmul": True, "precision": "bf16", "products": ["HGMMA"]}
    row |= {"registers": 255, "stack": 0, "local": 0, "shared": 1000}
    assert faults(row) == []
    assert "spills" in faults(row | {"stack": 8})[0] and "spills" in faults(row | {"local": 1})[0]
    assert "no HGMMA" in faults(row | {"products": ["HMMA"]})[0]
    assert "more than 232" in faults(row | {"precision": "ieee"})[0]
    assert "shared memory" in faults(row | {"shared": 240_000})[0]
