"""contrastive_par's Triton stages: their numbers, and that only declared variants are launched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from contrastive_par_stages import Problem  # noqa: E402
from contrastive_par_triton_cases import CASES, GPU_CASES, run_case  # noqa: E402
from kernel_launches import caught  # noqa: E402

from pybackdoor.kernels import (  # noqa: E402
    contrastive_par,
    contrastive_par_factors,
    contrastive_par_fix,
    contrastive_par_rows,
)

HERE = Path(__file__).resolve().parent
MODULES = (contrastive_par, contrastive_par_rows, contrastive_par_factors, contrastive_par_fix)
HATS = {"bf16": torch.bfloat16, "tf32": torch.float32}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Starts both scripts side by side; gives the function that waits for what one prints.

    Triton reads TRITON_INTERPRET when a kernel is defined.
    """
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
    environment["OMP_NUM_THREADS"] = "1"
    started = {
        script: subprocess.Popen(
            [sys.executable, "-W", "error", str(HERE / script)],
            env=environment, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for script in ("contrastive_par_triton_cases.py", "contrastive_par_driven.py")
    }  # fmt: skip

    def printed(script: str) -> str:
        out, err = started[script].communicate(timeout=600)
        assert started[script].returncode == 0, err[-3000:]
        return out

    yield printed
    for process in started.values():
        process.kill()
        process.communicate()


def test_the_stages_in_the_interpreter(interpreted):
    """In fp32 against fp64."""
    assert interpreted("contrastive_par_triton_cases.py").split() == list(CASES)


def test_the_whole_op_in_the_interpreter(interpreted):
    assert interpreted("contrastive_par_driven.py").split() == ["right"]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", contrastive_par.PRECISIONS)
@pytest.mark.parametrize("name", GPU_CASES)
def test_the_stages_on_a_gpu(name, precision):
    case = GPU_CASES[name]
    if precision == "tf32":  # its error grows with s, and the slow path does not use it
        if case.opposed:
            pytest.skip("the slow path's products are ieee")
        case = case._replace(scale=20.0)
    run_case(name, case, "cuda", precision)


def launch_all(m, n, d, dtype, precision):
    """Every launcher once, on tensors without data: text [m, d], image [n, d], one process."""

    def make(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    hat = HATS.get(precision, torch.float32)
    text, image, rows, columns = make(m, d, dtype=dtype), make(n, d, dtype=dtype), make(m), make(n)
    segment, owner = make(n + 1, dtype=torch.int32), make(m, dtype=torch.int32)
    bits, scalar, flagged = make(n, dtype=torch.uint8), make(), make(2, dtype=torch.int32)
    p = Problem(text, image, None, image, owner, segment, rows, columns, bits, scalar, True, 0)
    that, ihat = make(m, d, dtype=hat), make(n, d, dtype=hat)
    g_text, g_image, stats, total = make(m, d), make(n, d), make(6), make(5)
    pair = (rows, columns)
    contrastive_par_rows.prep(p, that, ihat, *pair, rows, *pair, flagged)
    e = make(m, -(-n // 16) * 16, dtype=hat)[:, :n] if m * n < 2**30 else None
    kr, kc = contrastive_par.partials(p, m, precision, e)
    row_partial, col_partial = make(kr, m), make(kc, n)
    contrastive_par.exp_block(p, that, ihat, 0, e, row_partial, col_partial, precision)
    contrastive_par_factors.sums(p, row_partial, col_partial, rows, rows, columns, columns)
    contrastive_par_fix.lse(p, that, ihat, *pair, *pair)
    factors = (rows, columns, rows, *pair, *pair, flagged)
    contrastive_par_factors.finalise(p, rows, *pair, columns, *pair, *factors)
    contrastive_par_factors.totals(p, *pair, *pair, total)
    contrastive_par_factors.close(total, 1, 2, stats)
    if e is not None:
        arguments = (p, that, ihat, e, 0, *pair, g_text, g_image, precision, True)
        contrastive_par.gradients(*arguments)
    contrastive_par_fix.fixup(p, that, ihat, *pair, *pair, flagged, g_text, g_image)
    contrastive_par_rows.normalize_backward(
        p, *pair, rows, stats, total, scalar, 0.5, g_text, g_image, text, image, *pair
    )


@pytest.mark.parametrize("arch", [80, 90])
def test_launchers_and_variants_are_the_same_set(arch, monkeypatch):
    """Every launch is a declared variant, and every declared variant is launched by some size."""
    monkeypatch.setattr(contrastive_par, "arch_of", lambda device: arch)
    declared = [v for module in MODULES for v in module.variants() if arch in v.archs]
    assert len({v.name for v in declared}) == len(declared)
    # Odd sizes; few tiles and many; the widths at which rows change; more than 2^31 pairs.
    sizes = [(1, 1, 1), (5, 3, 31), (512, 512, 512), (16384, 16384, 512), (3000, 2999, 4096)]
    sizes += [(700, 64, 640), (77 * 4096, 8192, 512)]
    with caught(declared) as launches:
        for m, n, d in sizes:
            for precision in contrastive_par.PRECISIONS:
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    launch_all(m, n, d, dtype, precision)
    unreached = {v.name for v in declared} - {v.name for v, _ in launches}
    assert not unreached, unreached


def test_what_is_not_launched():
    """Nothing where there is nothing to do, and plain words where a size or name is wrong."""
    p = Problem(*[torch.empty(3, 8192, device="meta")] * 2, *[None] * 8, True, 0)
    g = torch.empty(3, 8192, device="meta")
    with caught([]) as launches:
        contrastive_par_rows.normalize_backward(p, *[g] * 6, 0.5, *[None] * 6)
        contrastive_par_fix.fixup(p, g, g, *[g] * 5, None, None)
        contrastive_par.gradients(p, g, g, g, 0, g, g, None, None, "ieee", False)
        with pytest.raises(ValueError, match="D must be at most 4096 in Triton, got 8192"):
            contrastive_par_rows.prep(p, *[g] * 8)
        p = p._replace(bits=torch.empty(3, device="meta"))
        with pytest.raises(ValueError, match="precision must be one of bf16, .*, got 'fp8'"):
            contrastive_par.partials(p, 3, "fp8", None)
        with pytest.raises(ValueError, match="must have 1 and 1 slices, got 3 and 3"):
            contrastive_par.exp_block(p, g, g, 0, None, g, g, "ieee")
    assert launches == []


def test_tf32_is_the_nearest_and_keeps_what_is_not_finite():
    from pybackdoor.ops._contrastive_par_gpu import _round_to_tf32

    # The last three are NaN: a GPU's own, a CPU's, and one with a sign.
    bits = [0x7F800000, -0x800000, 0x7FFFFFFF, 0x7FC00000, -0x400000]
    odd = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    x = torch.cat([torch.randn(1000, generator=torch.Generator().manual_seed(0)), odd])
    rounded = x.clone()
    _round_to_tf32(rounded)
    assert torch.equal(rounded[1000:1002], odd[:2]) and rounded[1002:].isnan().all()
    step = x[:1000].abs().log2().floor().exp2() / 1024  # ten bits of mantissa
    assert ((rounded - x)[:1000].abs() <= step / 2).all()
    assert torch.equal((rounded[:1000] / step).round() * step, rounded[:1000])
