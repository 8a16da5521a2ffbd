"""Every native stage of contrastive_par against the stages in plain torch, in fp64."""

import contrastive_par_stages as oracle
import pytest
import torch
from contrastive_par_cases import (
    SIZES,
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

# lanes1 and lanes32 run the body shared with CUDA on the host, as one lane and as a warp.
ISAS = ["avx512", "avx2", "portable", "lanes1", "lanes32"]
USABLE = [i for i in ISAS if i.startswith("lanes") or i in _native._C.isas()]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# Of an element's size: scores of 100 have an ulp of 8e-6, which exp turns into a relative error.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 4e-5}
OUTPUTS = ("d_text", "d_image", "dot_text", "dot_image")  # of normalize_backward
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
    want = double(want.cpu().to(got.dtype))
    got = double(got)
    assert torch.equal(got.isnan(), want.isnan()), what
    got, want = got.nan_to_num(nan=0, posinf=1e300), want.nan_to_num(nan=0, posinf=1e300)
    finite = want[want.abs() < 1e299]
    scale = want.abs() + floor * (finite.abs().max() if finite.numel() else 0)
    bad = (got - want).abs() > tolerance * (scale + tolerance)
    assert not bad.any(), (what, got[bad][:5], want[bad][:5])


def matrix_of(p):
    return torch.float64 if p.text.dtype == torch.float64 else torch.float32


def tolerance_of(p):
    return TOLERANCES[p.scale.dtype] * max(1.0, p.scale.item() / 100)


def run_stage(name, p, state, matrix, compare=True):
    """Runs one native stage, and the oracle's on the same inputs; (got, want) by output's name."""
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
    if compare:
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
            tolerance, floor = tolerance_of(p), 1e-3
            if n in ("that", "ihat"):
                tolerance = {torch.bfloat16: 4e-3}.get(matrix, 1e-6 if acc != torch.float64 else 0)
                tolerance, floor = max(tolerance, 1e-15), 0
            elif n in ("g_text", "g_image", "target", "dist_text", "dist_image"):
                floor = 1.0  # sums with cancellation
            check(got[n], want[n], tolerance, (name, n), floor)


def check_blocks(p, state):
    """exp_block and scale_block, the text rows in blocks of which the last is smaller."""
    acc, m = p.scale.dtype, len(p.text)
    tolerance = tolerance_of(p)
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
        torch.testing.assert_close(e, out, rtol=0, atol=0, equal_nan=True)
        scaled.append(out)
    check(rows[0], state["e"].sum(1), tolerance, "rows")
    check(columns.to(acc), wanted, tolerance, "columns")
    factor = alpha[:, None] + torch.where(p.weight[:, None] > 0, beta[None], 0)
    ds = torch.where(factor == 0, 0, state["e"] * factor)
    check(torch.cat(scaled), ds, tolerance, "ds")


def backward(backend, p, ins, state, towers, distance_weight=0.5):
    """d_text, d_image, dot_text, dot_image; None for the towers that are off."""
    table, acc, device = shapes(p, matrix_of(p)), p.scale.dtype, p.text.device
    own = slice(p.offset, p.offset + len(p.image))
    g = [state["g_text"].to(device, acc).clone(), state["g_image"][own].to(device, acc).clone()]
    g = [t if on else None for t, on in zip(g, towers, strict=True)]
    outs = {}
    for name, on in zip(OUTPUTS, towers * 2, strict=True):
        shape, dtype = table[name]
        outs[name] = torch.full(shape, 7, dtype=dtype, device=device) if on else None
    backend.normalize_backward(p, *ins.values(), distance_weight, *g, *outs.values())
    return outs


def magnitudes(p, ins, state, towers):
    """As `backward`, of sums in which nothing cancels: the scale of what rounding may do."""
    names = [n for n in ("text", "image", "text_ref", "image_ref") if getattr(p, n) is not None]
    signs = {n: getattr(p, n).abs() * (-1 if "ref" in n else 1) for n in names}
    state = {n: state[n].abs() for n in ("g_text", "g_image")}
    p = p._replace(**signs, normalize=False)
    return backward(oracle, p, {n: t.abs() for n, t in ins.items()}, state, towers, -0.5)


def check_backward(p, state):
    """Both towers, and each alone with the other's tensors absent."""
    acc, dtype = p.scale.dtype, p.text.dtype
    names = "inv_text inv_image coef stats total grad".split()
    ins = {n: state[n].to(p.text.device, acc) for n in names}
    ulp = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, 0)
    for towers in ((True, True), (True, False), (False, True)):
        got = backward(native, p, ins, state, towers)
        reference = double(ins)
        for name in ("inv_text", "inv_image"):  # 1 / EPS, which fp32 rounds
            reference[name][reference[name] > 0.999999 / oracle.EPS] = 1 / oracle.EPS
        want = backward(oracle, double(p), reference, state, towers)
        size = magnitudes(double(p), reference, state, towers)
        for name, result in got.items():
            if result is None:
                continue
            w, bound = want[name], tolerance_of(p) * size[name] + torch.finfo(acc).tiny
            if name[1] == "_":
                bound = bound + bound.amax(1, keepdim=True) + ulp * w.abs()
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_stages_on_all_sizes(isa, dtype):
    for k, (m, n, d) in enumerate(SIZES):
        check_all(random_problem(m, n, d, dtype=dtype, seed=k))


CASES = {
    "other ranks' images": dict(around=(7, 4)),
    "rows as they are": dict(normalize=False),
    "no references": dict(refs=False, around=(0, 2)),
    "all sums tiny": dict(far=True),
    "tiny sums at a large scale": dict(scale=300.0, around=(3, 0)),
    "sums that overflow": dict(normalize=False, stretch=1.6, scale=90.0, features=3),
    "no shift": dict(scale=10.0),
}


def check_case(case, dtype, device="cpu"):
    kind = dict(features=40) | CASES[case]
    p = random_problem(23, 17, dtype=dtype, seed=5, device=device, **kind)
    state = oracle_state(p)
    flagged = state["flagged"].tolist()
    needed = "sums" in case
    assert (min(flagged) > 3) == needed and (max(flagged) > 0) == needed, flagged
    check_all(p)


@pytest.mark.parametrize("case", CASES)
def test_stages_in_special_cases(isa, case):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        if dtype != torch.float64 or "overflow" not in case:  # which takes scores beyond 700
            check_case(case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_stages_on_a_gpu(dtype):
    many = (20000, 2500, 8)  # lines enough that a warp takes several; its fp64 oracle is slow
    sizes = [*SIZES, (700, 90, 72), *([many] if dtype == torch.float32 else [])]
    for k, (m, n, d) in enumerate(sizes):
        check_all(random_problem(m, n, d, dtype=dtype, seed=k, device="cuda"))
    for case in CASES:
        check_case(case, dtype, "cuda")
    p = random_problem(12, 9, 70, dtype=dtype, seed=8, around=(1, 2), far=True, device="cuda")
    state = oracle_state(p)
    check_stages(p, state, torch.bfloat16, ("prep", "lse", "fixup"))


def test_a_bf16_matrix_dtype(isa):
    """As on a GPU: unit rows are rounded to bf16, and read again as such."""
    for kind in (dict(), dict(far=True)):
        for dtype in DTYPES[:3]:
            p = random_problem(12, 9, 70, dtype=dtype, seed=8, around=(1, 2), **kind)
            state = oracle_state(p)
            for name in ("that", "all_ihat"):
                state[name] = state[name].bfloat16().double()
            check_stages(p, state, torch.bfloat16, ("prep", "lse", "fixup"))


@given(
    rows=st.integers(1, 40),
    images=st.integers(1, 20),
    features=st.integers(1, 70),
    around=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
    isa=st.sampled_from(USABLE),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
@settings(max_examples=60, deadline=None)
def test_stages_on_any_shape(rows, images, features, around, dtype, seed, isa, flags):
    normalize, refs, far = flags
    p = random_problem(
        *(rows, images, features),
        dtype=dtype, seed=seed, around=around, normalize=normalize, refs=refs, far=far,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYBACKDOOR_CPU_ISA", isa)
        check_all(p)


@pytest.mark.parametrize("where", ["text", "image"])
def test_nan_features_propagate(isa, where):
    p = random_problem(9, 7, 20, seed=2, around=(1, 1))
    p.bits.fill_(oracle.VALID)
    p.weight[4] = 0.1
    getattr(p, where)[{"text": 4, "image": 3}[where], 5] = torch.nan
    state = oracle_state(p)
    assert state["stats"][0].isnan() and state["alpha"].isnan().any()
    check_stages(p, state, names=("prep", "sums", "lse", "finalise", "totals"))
    check_blocks(p, state)
    check_backward(p, state)


def test_close(isa):
    """Open and closed gates, no rows at all, NaN distances."""
    nan = torch.nan
    for dtype in (torch.float32, torch.float64):
        for values in ([3, 2, 4, 9, 3], [3, 0, 0, 0, 0], [3, nan, 4, 3, 3], [nan, 9, 3, 9, 3]):
            for weight, tau in ((0.5, 2.15), (-0.3, torch.inf), (0.0, 0.1)):
                total = torch.tensor(values, dtype=dtype)
                got, want = torch.full((6,), 7, dtype=dtype), torch.empty(6, dtype=torch.float64)
                native.close(total, weight, tau, got)
                oracle.close(total.double(), weight, tau, want)
                check(got, want, 1e-6, (values, weight, tau))


def exponentials(x, isa, monkeypatch):
    """exp of values, as exp_block forms it; fp32."""
    monkeypatch.setenv("PYBACKDOOR_CPU_ISA", isa)
    p = random_problem(1, 1, 1, around=(0, len(x)), scale=1.0)
    p.weight.fill_(1)
    p.bits.fill_(oracle.VALID)
    e = torch.cat((torch.zeros(1), x))[None].contiguous()
    sums = torch.empty(1, 1), torch.empty(1, 1 + len(x))
    native.exp_block(p, e, 0, *sums)
    assert e[0, 0] == 0 and torch.equal(sums[1][0].nan_to_num(7), e[0].nan_to_num(7))
    return e[0, 1:]


def test_exp_is_accurate_and_the_same_on_all_instruction_sets(monkeypatch):
    g = torch.Generator().manual_seed(0)
    x = torch.cat((torch.linspace(-150, 100, 50001), 2 * torch.randn(20000, generator=g)))
    ends = torch.tensor([88.722, 88.7229, 89.0, 1e30, torch.inf, -103.9, -104.1, -1e30, -torch.inf])
    inputs = torch.cat((x, ends, torch.tensor([torch.nan])))
    got = {isa: exponentials(inputs, isa, monkeypatch) for isa in USABLE}
    first = got[USABLE[0]]
    assert all(torch.equal(v[:-1], first[:-1]) and v[-1].isnan() for v in got.values())
    want = x.double().exp()
    normal = (want > torch.finfo(torch.float32).tiny) & (want < 3.4e38)
    ulp = torch.exp2(torch.floor(torch.log2(want)) - 23).clamp_min(2.0**-149)
    error = (first[: len(x)].double() - want).abs() / ulp
    assert error[normal].max() < 1.3
    assert error[want < torch.finfo(torch.float32).tiny].max() <= 1
    assert (first[: len(x)][want > 3.5e38] == torch.inf).all()
    assert torch.equal(first[len(x) : -1].isinf(), ends > 88.7228)
    assert first[len(x) + 5] > 0 and not first[len(x) + 6 : -1].any()


def test_threads_and_tiles_do_not_change_the_result(isa):
    """Three tiles of columns by three of rows; the bits are the same for any number of threads."""
    p = random_problem(150, 150, 8, seed=3, around=(2000, 2800))
    state = oracle_state(p)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            e = (state["that"] @ state["all_ihat"].T).float()
            rows, columns = torch.empty(1, 150), torch.empty(1, len(p.bits))
            native.exp_block(p, e, 0, rows, columns)
            outs = [e, rows, columns]
            for name in STAGES:
                outs += run_stage(name, p, state, torch.float32, compare=False)[0].values()
            ins = {n: state[n].float() for n in "inv_text inv_image coef stats total grad".split()}
            outs += backward(native, p, ins, state, (True, True)).values()
            results.append(outs)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    check(results[0][1][0], state["row_partial"][0], TOLERANCES[torch.float32], "rows")
    check(results[0][2], state["col_partial"], TOLERANCES[torch.float32], "columns")


def test_instruction_sets_give_the_same_bits(monkeypatch):
    p = random_problem(40, 40, 37, seed=4, dtype=torch.float16, far=True)
    state, results = oracle_state(p), []
    ins = {n: state[n].float() for n in "inv_text inv_image coef stats total grad".split()}
    for isa in (i for i in USABLE if not i.startswith("lanes")):
        monkeypatch.setenv("PYBACKDOOR_CPU_ISA", isa)
        outs = []
        for name in STAGES:
            outs += run_stage(name, p, state, torch.float32, compare=False)[0].values()
        results.append(outs + list(backward(native, p, ins, state, (True, True)).values()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_fixup_does_nothing_where_nothing_is_flagged(isa):
    p = random_problem(6, 6, 8, far=True)
    state = oracle_state(p)
    assert state["row_fix"].any()
    state["flagged"].zero_()
    got, _ = run_stage("fixup", p, state, torch.float32)
    assert torch.equal(got["g_text"].double(), state["g_text"].float().double())


def test_what_would_read_astray_is_refused(monkeypatch):
    p = random_problem(4, 4, 8)
    e, rows, columns = torch.zeros(2, 4), torch.empty(1, 4), torch.empty(1, 4)
    with pytest.raises(ValueError, match="the block must lie within the text rows"):
        native.exp_block(p, e, 3, rows, columns)
    with pytest.raises(ValueError, match="required: row_partial, scores"):
        native.exp_block(p, e, 0, None, columns)
    with pytest.raises(ValueError, match="required: total, stats"):
        native.close(torch.zeros(5), 0.5, 2.0, torch.empty(0))
    with pytest.raises(ValueError, match="offset \\+ images <= all_images"):
        native.exp_block(p._replace(offset=1), e, 0, rows, columns)
    with pytest.raises(ValueError, match="features must be > 0"):
        native.exp_block(p._replace(text=torch.zeros(4, 0)), e, 0, rows, columns)
    half = [torch.empty(4, 8, dtype=torch.float16)] * 2
    with pytest.raises(ValueError, match="matrix_dtype must be float32, bfloat16"):
        native.lse(p, *half, *[torch.empty(4)] * 4)
    monkeypatch.setenv("PYBACKDOOR_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match="instruction set mmx is not usable"):
        native.exp_block(p, e, 0, rows, columns)
