"""Every native stage of contrastive_par against the stages in plain torch, in fp64."""

import contrastive_par_stages as oracle
import pytest
import torch
from contrastive_par_cases import (
    SIZES,
    acc_of,
    blank,
    double,
    oracle_state,
    random_problem,
    shapes,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pybackdoor import _native
from pybackdoor.ops import _contrastive_par_native as native

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# lanes1 and lanes32 run the body shared with CUDA on the host, as one lane and as a warp.
ISAS = ["avx512", "avx2", "portable", "lanes1", "lanes32"]
USABLE = [i for i in ISAS if i.startswith("lanes") or i in _native._C.isas()]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# Of an element's size: scores of 100 have an ulp of 8e-6, which exp turns into a relative error.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 4e-5}
# Each stage's inputs and outputs among the tensors that oracle_state forms.
STAGES = {
    "prep": ("", "that ihat inv_text inv_image target dist_text dist_image flagged"),
    "sums": ("row_partial col_partial target", "r c log_p"),
    "lse": ("that all_ihat r c", "row_lse col_lse"),
    "finalise": (
        "target r c log_p row_lse col_lse",
        "alpha beta coef row_fix col_fix loss_row loss_col flagged",
    ),
    "totals": ("loss_row loss_col dist_text dist_image", "total"),
    "fixup": ("that all_ihat row_fix col_fix row_lse col_lse flagged g_text g_image", ""),
}


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """Forces one CPU instruction set, or one of the test drivers."""
    if request.param not in USABLE:
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setenv("PYBACKDOOR_CPU_ISA", request.param)
    return request.param


def check(got, want, tolerance, what, floor=0.0):
    """|got - want| <= tolerance (|want| + floor max |want| + tolerance); NaN and inf alike."""
    got, want = double(got), double(want)
    assert torch.equal(got.isnan(), want.isnan()), what
    got, want = got.nan_to_num(nan=0, posinf=1e300), want.nan_to_num(nan=0, posinf=1e300)
    finite = want[want.abs() < 1e299]
    scale = want.abs() + floor * (finite.abs().max() if finite.numel() else 0)
    bad = (got - want).abs() > tolerance * (scale + tolerance)
    assert not bad.any(), (what, got[bad][:5], want[bad][:5])


def matrix_of(p):
    return torch.float64 if p.text.dtype == torch.float64 else torch.float32


def run_stage(name, p, state, matrix):
    """Runs one native stage and the oracle's on the same inputs; (got, want) by output's name."""
    ins, outs = (names.split() for names in STAGES[name])
    table = shapes(p, matrix)
    device, acc = p.text.device, p.scale.dtype
    given = {n: state[n].to(device, table[n][1] if n in table else acc).clone() for n in ins}
    reference = double(given)
    got = blank(p, matrix, outs)
    want = blank(double(p), torch.float64, outs)
    if name == "sums":  # of this rank's images
        for t in (got, want):
            t["log_p"] = t["log_p"][p.offset : p.offset + len(p.image)].clone()
    if name == "finalise":  # adds to flagged
        got["flagged"].zero_()
        want["flagged"].zero_()
    getattr(native, name)(p, *given.values(), *got.values())
    getattr(oracle, name)(double(p), *reference.values(), *want.values())
    if name == "fixup":  # in place
        for n in ("g_text", "g_image"):
            got[n], want[n] = given[n], reference[n]
    return got, want


def check_stages(p, state, matrix=None, names=STAGES):
    matrix = matrix or matrix_of(p)
    acc = p.scale.dtype
    for name in names:
        got, want = run_stage(name, p, state, matrix)
        for n in got:
            tolerance, floor = TOLERANCES[acc], 1e-3
            if n in ("that", "ihat"):
                tolerance = {torch.bfloat16: 4e-3}.get(matrix, 1e-6 if acc != torch.float64 else 0)
                tolerance, floor = max(tolerance, 1e-15), 0
            elif n in ("g_text", "g_image", "target", "dist_text", "dist_image"):
                floor = 1.0  # sums with cancellation
            check(got[n], want[n], tolerance, (name, n), floor)


def check_blocks(p, state):
    """exp_block and scale_block, the text rows in blocks of which the last is smaller."""
    acc, m = p.scale.dtype, len(p.text)
    tolerance = TOLERANCES[acc]
    products = state["that"] @ state["all_ihat"].T
    rows = torch.full((1, m), 7, dtype=acc)
    wanted = torch.zeros(len(p.bits), dtype=torch.float64)
    columns = torch.zeros_like(wanted)
    scaled, step = [], max(1, (m + 1) // 2 + 1)
    alpha, beta = state["alpha"].to(acc), state["beta"].to(acc)
    for first in range(0, m, step):
        e = products[first : first + step].to(acc)
        rest = torch.full((1, len(p.bits)), 7, dtype=acc)
        native.exp_block(p, e, first, rows, rest)
        want = state["e"][first : first + step]
        assert torch.equal(e == 0, want.to(acc) == 0)
        check(e, want, tolerance, "e")
        columns += rest[0].double()
        wanted += torch.where(p.weight[first : first + step, None] > 0, want, 0).sum(0)
        out = torch.full_like(e, 7)
        native.scale_block(p, e, alpha, beta, first, out)
        native.scale_block(p, e, alpha, beta, first, e)  # in place
        assert torch.equal(e, out)
        scaled.append(out)
    check(rows[0], state["e"].sum(1), tolerance, "rows")
    check(columns, wanted, tolerance, "columns")
    factor = alpha[:, None] + torch.where(p.weight[:, None] > 0, beta[None], 0)
    ds = torch.where(factor == 0, 0, state["e"] * factor)
    check(torch.cat(scaled), ds, tolerance, "ds")


def backward(backend, p, ins, state, towers):
    """d_text, d_image, dot_text, dot_image; None for the towers that are off."""
    table, acc, device = shapes(p, matrix_of(p)), p.scale.dtype, p.text.device
    own = slice(p.offset, p.offset + len(p.image))
    g = [state["g_text"].to(device, acc).clone(), state["g_image"][own].to(device, acc).clone()]
    g = [t if on else None for t, on in zip(g, towers)]
    outs = {}
    for name, on in zip(("d_text", "d_image", "dot_text", "dot_image"), towers * 2):
        shape, dtype = table[name]
        outs[name] = torch.full(shape, 7, dtype=dtype, device=device) if on else None
    backend.normalize_backward(p, *ins.values(), 0.5, *g, *outs.values())
    return outs


def check_backward(p, state):
    """Both towers, and each alone with the other's tensors absent."""
    acc, dtype = p.scale.dtype, p.text.dtype
    names = "inv_text inv_image coef stats total grad".split()
    ins = {n: state[n].to(p.text.device, acc) for n in names}
    ulp = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, 0)
    for towers in ((True, True), (True, False), (False, True)):
        got = backward(native, p, ins, state, towers)
        reference = double(p), double(ins), state, towers
        want = backward(oracle, *reference)
        # The projection cancels: its error is of the size of what it is given.
        free = backward(oracle, double(p)._replace(normalize=False), *reference[1:])
        for name, result in got.items():
            if result is None:
                continue
            w, size = want[name], free[name].abs()
            if name[1] == "o":
                bound = TOLERANCES[acc] * (size + size.max())
            else:
                bound = TOLERANCES[acc] * (size + size.amax(1, keepdim=True)) + ulp * w.abs()
                # fp16: values beyond its range become inf, those below 2^-24 zero.
                bound += 6e-8 * (dtype == torch.float16)
                w = torch.where(w.abs() > torch.finfo(dtype).max, torch.inf * w.sign(), w)
            result, finite = double(result), torch.isfinite(w)
            assert torch.equal(result[~finite].nan_to_num(3), w[~finite].nan_to_num(3)), name
            error = (result - w).abs()[finite]
            assert (error <= bound[finite]).all(), (name, towers, (error / bound[finite]).max())


def check_all(p):
    state = oracle_state(p)
    check_stages(p, state)
    if p.text.device.type == "cpu":
        check_blocks(p, state)
    check_backward(p, state)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_stages_on_all_sizes(isa, dtype, device):
    if device == "cuda" and (isa != "portable" or dtype == torch.float64):
        pytest.skip("CUDA runs once, and not in fp64")
    for k, (m, n, d) in enumerate(SIZES):
        check_all(random_problem(m, n, d, dtype=dtype, seed=k, device=device))
