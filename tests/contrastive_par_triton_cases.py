"""contrastive_par's Triton stages against the fp64 oracle, one by one, on any device.

    TRITON_INTERPRET=1 python contrastive_par_triton_cases.py [CASE ...]

runs them in Triton's interpreter on the CPU. Every stage gets the oracle's numbers, so that an
error is its own. Outputs start as NaN and lie between guards that must not change; so do the
inputs, whose guards are NaN, so that what is read beside them shows.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import contrastive_par_stages as oracle
import numpy as np
import torch
from contrastive_par_stages import SUSPECT, VALID, Problem
from torch import Tensor

from pybackdoor.kernels import (
    contrastive_par,
    contrastive_par_factors,
    contrastive_par_fix,
    contrastive_par_rows,
)

GUARD = 64  # elements on either side; keeps 16-byte alignment
# Of a stage's largest value, for E and its sums of each value. At s = 100 an error of 2^-24 in a
# cosine is 6e-6 in E; E and dS are rounded to bf16; tf32 drops 13 bits of the features.
TOLERANCES = {"ieee": 5e-5, "tf32x3": 2e-4, "tf32": 4e-2, "bf16": 1e-2}


class Case(NamedTuple):
    """Sizes and what is special; see CASES for why each is there."""

    rows: int
    images: int
    depth: int
    all_images: int = 0  # of all ranks; 0: this one's
    offset: int = 0
    scale: float = 20.0
    mixed: bool = True  # weights of both signs and 0, invalid and suspect images
    opposed: int = 0  # rows whose best cosine is about -0.7; -1: all
    normalize: bool = True
    refs: bool = True
    nan: bool = False
    dtype: torch.dtype = torch.float32


CASES = {
    "one": Case(1, 1, 16, mixed=False),  # no negative at all
    "odd": Case(3, 5, 31, mixed=False, refs=False),  # features that are read one by one
    "ranks": Case(20, 9, 48, 23, 7),  # other ranks' images on both sides; padded E
    "tiles": Case(70, 67, 64, mixed=True, scale=100.0),  # two tiles each way, tails in both
    "raster": Case(140, 130, 16, mixed=False),  # several slices of sums, segments of several rows
    "given": Case(20, 9, 48, normalize=False),
    "fixed_rows": Case(40, 21, 32, scale=100.0, opposed=13),  # some lines underflow
    "fixed_all": Case(35, 37, 31, 41, 2, scale=100.0, opposed=-1, mixed=False),  # and columns
    "fixed_mixed": Case(35, 37, 32, scale=100.0, opposed=-1),  # with masks
    "nan": Case(20, 9, 48, nan=True),
}
GPU_CASES = CASES | {  # too large for the interpreter: the large tiles, and wide rows
    "large": Case(3000, 2100, 512, 4300, 1100),
    "wide": Case(300, 257, 1152, dtype=torch.bfloat16),
    "widest": Case(130, 129, 4096, dtype=torch.float16),
}


class Bench:
    """Tensors between guards on one device, and the comparisons made with them."""

    def __init__(self, device: str, name: str, precision: str) -> None:
        self.device, self.name, self.precision = device, name, precision
        self.guarded: list[tuple[Tensor, Tensor, float | int]] = []
        self.matrix = torch.bfloat16 if precision == "bf16" else torch.float32

    def make(self, shape: tuple[int, ...], dtype=torch.float32, fill=None) -> Tensor:
        """An output: NaN (or fill, or -77) inside, a guard on either side."""
        floating = dtype.is_floating_point
        inside = fill if fill is not None else (float("nan") if floating else -77)
        count = torch.Size(shape).numel()
        store = torch.full((count + 2 * GUARD,), 77, dtype=dtype, device=self.device)
        view = store[GUARD : GUARD + count].view(shape)
        view.fill_(inside)
        self.guarded.append((store, view, 77))
        return view

    def take(self, x: Tensor, dtype=None) -> Tensor:
        """An input, as it is or in that dtype; beside it lies NaN."""
        dtype = dtype or (torch.float32 if x.dtype == torch.float64 else x.dtype)
        beside = float("nan") if dtype.is_floating_point else 99
        store = torch.full((x.numel() + 2 * GUARD,), beside, dtype=dtype, device=self.device)
        view = store[GUARD : GUARD + x.numel()].view(x.shape)
        view.copy_(x)
        return view

    def same(self, what: str, got: Tensor, want: Tensor, each=False, tolerance=None) -> None:
        got, want = got.detach().cpu().double(), want.double()
        tolerance = tolerance or TOLERANCES[self.precision]
        text = f"{self.name}, {self.precision}: {what}"
        odd = ~want.isfinite()
        if not torch.equal(got[odd].nan_to_num(7, 8, 9), want[odd].nan_to_num(7, 8, 9)):
            raise AssertionError(f"{text}: wrong where not finite: {got[odd]} for {want[odd]}")
        size = want[~odd].abs()
        limit = tolerance * (size if each else size.max() if len(size) else size) + 1e-30
        apart = (got[~odd] - want[~odd]).abs()
        if not bool((apart <= limit).all()):
            at = (apart - limit).nan_to_num(torch.inf).argmax()
            pair = f"{got[~odd][at]:.8g} for {want[~odd][at]:.8g}"
            raise AssertionError(f"{text}: {pair}; largest error {apart.max():.3g}")

    def check_guards(self, stage: str) -> None:
        for store, _, guard in self.guarded:
            ends = torch.cat((store[:GUARD], store[-GUARD:]))
            if not bool((ends == guard).all()):
                raise AssertionError(f"{self.name}, {self.precision}: {stage} wrote outside")
        self.guarded.clear()


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def make_problem(case: Case) -> tuple[Problem, Tensor]:
    """The problem in fp64 (of values that the inputs' dtype holds), and all ranks' unit images."""
    g = torch.Generator().manual_seed(case.rows * 1000 + case.images)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    m, n, d, total = case.rows, case.images, case.depth, case.all_images or case.images
    text, image, others = normal(m, d), normal(n, d), unit(normal(total, d))
    if case.opposed:
        axis = unit(normal(1, d)) * d**0.5
        image, others = 0.4 * image - axis, unit(0.4 * others * d**0.5 - axis)
        rows = slice(None) if case.opposed < 0 else slice(case.opposed)
        text[rows] = 0.4 * text[rows] + axis
    owner = torch.arange(m) * n // m if m >= n else torch.arange(m) * 2 % n
    owner = owner.sort().values.int()
    if case.mixed:
        owner = torch.where(owner == n // 2, (owner - 1).clamp_min(0), owner)  # an image of no row
    weight, v = torch.rand(m, generator=g).double() + 0.5, torch.rand(total, generator=g).double()
    bits = torch.full((total,), VALID, dtype=torch.uint8)
    if case.mixed:
        weight *= torch.tensor([1, 1, -1, 0, 1])[torch.arange(m) % 5]
        bits[torch.arange(total) % 5 == 4] = SUSPECT  # not valid
        bits[torch.arange(total) % 3 == 1] |= SUSPECT
        v[torch.arange(total) % 8 == 3] = 0
    valid = (bits & VALID) != 0
    weight = torch.where(valid[case.offset + owner.long()], weight / m, 0).float().double()
    v = torch.where(valid, v / n, 0).float().double()
    if not case.normalize:
        text, image = 1.02 * unit(text), 0.97 * unit(image)
    refs = [unit(x + normal(*x.shape)) if case.refs else None for x in (text, image)]
    if case.images > 1 and case.normalize and case.dtype != torch.float16:  # else d overflows
        image[0] *= 5e-13 / image[0].norm()  # below the smallest norm
    if case.nan:
        text[2, 5] = torch.nan
        image[4, 0] = torch.nan  # not valid: must not be seen
        bits[4] = 0
        weight[owner == 4] = 0
        v[4] = 0
    text, image, *refs = (
        x if x is None else x.to(case.dtype).double() for x in (text, image, *refs)
    )
    segment = torch.searchsorted(owner, torch.arange(n + 1, dtype=torch.int32)).int()
    scale = torch.tensor(case.scale, dtype=torch.float64)
    problem = Problem(
        text, image, *refs, owner, segment, weight, v, bits, scale, case.normalize, case.offset
    )
    return problem, others


def run_case(name: str, case: Case, device: str, precision: str) -> None:
    """Every stage of one case; raises AssertionError with the first difference."""
    p, ihat = make_problem(case)
    b = Bench(device, name, precision)
    features = ("text", "image", "text_ref", "image_ref")
    fields = {
        f: b.take(x, case.dtype if f in features else None) if isinstance(x, Tensor) else x
        for f, x in p._asdict().items()
    }
    q = Problem(**fields)
    m, n, d, total = case.rows, case.images, case.depth, len(p.bits)
    double = {"dtype": torch.float64}
    exact = 2e-5

    # prep
    want = [torch.zeros(m, d, **double), torch.zeros(n, d, **double)]
    want += [torch.zeros(k, **double) for k in (m, n, m, m, n)]
    flagged = torch.tensor([3, 4], dtype=torch.int32)
    oracle.prep(p, *want, flagged)
    got = [b.make(x.shape, b.matrix if k < 2 else torch.float32) for k, x in enumerate(want)]
    got_flagged = b.make((2,), torch.int32)
    contrastive_par_rows.prep(q, *got, got_flagged)
    names = "that ihat inv_text inv_image target dist_text dist_image".split()
    rounding = 8e-3 if precision == "bf16" else exact
    for what, x, y in zip(names, got, want, strict=True):
        b.same(f"prep {what}", x, y, tolerance=rounding if what in ("that", "ihat") else exact)
    b.same("prep flagged", got_flagged, flagged)
    b.check_guards("prep")
    that, own_ihat, inv_text, inv_image, target, dist_text, dist_image = want

    # exp_block: by blocks of rows, as waves are; E between rows that are further apart, or not
    that, ihat = that.to(b.matrix).double(), ihat.clone()
    ihat[p.offset : p.offset + n] = own_ihat
    ihat = ihat.to(b.matrix).double()
    that_, ihat_ = b.take(that, b.matrix), b.take(ihat, b.matrix)
    e = torch.zeros(m, total, **double)
    first_rows = m if m < 20 else m * 2 // 3
    blocks = [(0, first_rows)] + ([(first_rows, m - first_rows)] if first_rows < m else [])
    padded = -(-total // 16) * 16
    for layout in ("contiguous", "padded", "none"):
        stride = padded if layout == "padded" else total
        c, want_c, got_e = 0, 0, b.make((m, stride), b.matrix)
        got_row = None
        for first, rows in blocks:
            part = slice(first, first + rows)
            want_row = torch.zeros(1, m, **double)
            want_col = torch.zeros(1, total, **double)
            oracle.exp_block(p, that[part], ihat, first, e[part], want_row, want_col)
            block_e = None if layout == "none" else got_e[part, :total]
            kr, kc = contrastive_par.partials(q, rows, precision, block_e)
            if got_row is None:
                got_row = b.make((kr, m))
            got_col = b.make((kc, total))
            arguments = (q, that_[part], ihat_, first, block_e, got_row, got_col, precision)
            contrastive_par.exp_block(*arguments)
            b.same(
                "exp_block rows", got_row[:, part].cpu().double().sum(0), want_row[0, part], True
            )
            c, want_c = c + got_col.cpu().double().sum(0), want_c + want_col[0]
            b.same("exp_block columns", got_col.cpu().double().sum(0), want_col[0], True)
        if layout != "none":
            b.same(f"exp_block {layout}", got_e[:, :total], e, each=True)
            assert not got_e[:, total:].any(), "E is not 0 past its columns"
        else:
            assert bool(got_e.isnan().all())
        b.check_guards("exp_block")
    r_partial, c_partial = torch.zeros(11, m, **double), torch.zeros(9, total, **double)
    oracle.exp_block(p, that, ihat, 0, e, r_partial, c_partial)
    r_partial, c_partial = (
        x[:1]
        * torch.rand(len(x), 1, generator=torch.Generator().manual_seed(3), **double).softmax(0)
        for x in (r_partial, c_partial)
    )

    # sums
    want = [torch.zeros(k, **double) for k in (m, total, n)]
    oracle.sums(p, r_partial, c_partial, target, *want)
    got = [b.make(x.shape) for x in want]
    contrastive_par_factors.sums(q, *map(b.take, (r_partial, c_partial, target)), *got)
    for what, x, y in zip(("r", "c"), got, want, strict=False):
        b.same(f"sums {what}", x, y, each=True, tolerance=exact)
    b.same("sums log_p", got[2], want[2], tolerance=exact)
    b.check_guards("sums")
    r, c, own_log_p = want

    # lse: a sum near the threshold may fall on either side, so both get the rounded one
    r, c = r.float().double(), c.float().double()
    fixed = [torch.zeros(m, **double), torch.zeros(total, **double)]
    oracle.lse(p, that, ihat, r, c, *fixed)
    got = [b.make(x.shape) for x in fixed]
    r_, c_ = b.take(r), b.take(c)
    contrastive_par_fix.lse(q, that_, ihat_, r_, c_, *got)
    for what, x, y in zip(("rows", "columns"), got, fixed, strict=True):
        b.same(f"lse {what}", x, y, tolerance=exact)
    b.check_guards("lse")

    # finalise
    log_p = -torch.rand(total, generator=torch.Generator().manual_seed(4), **double)
    log_p[p.offset : p.offset + n] = own_log_p
    want = [torch.zeros(k, **double) for k in (m, total, m, m, total, m, n)]
    flagged = torch.zeros(2, dtype=torch.int32)
    oracle.finalise(p, target, r, c, log_p, *fixed, *want, flagged)
    got, got_flagged = [b.make(x.shape) for x in want], b.make((2,), torch.int32, 0)
    inputs = (b.take(x) for x in (target, r, c, log_p, *fixed))
    contrastive_par_factors.finalise(q, *inputs, *got, got_flagged)
    names = "alpha beta coef row_fix col_fix loss_row loss_col".split()
    for what, x, y in zip(names, got, want, strict=True):
        b.same(f"finalise {what}", x, y, each=what in ("alpha", "beta"), tolerance=1e-4)
    b.same("finalise flagged", got_flagged, flagged)
    if case.opposed:
        assert flagged[0] > 0 and (flagged[1] > 0) == (case.opposed < 0), flagged
    else:
        assert not flagged.any() or case.rows == 1 or not case.normalize, flagged
    b.check_guards("finalise")
    alpha, beta, coef, row_fix, col_fix, loss_row, loss_col = want

    # totals and close, with gates open and closed
    want_total, want_stats = torch.zeros(5, **double), torch.zeros(6, **double)
    oracle.totals(p, loss_row, loss_col, dist_text, dist_image, want_total)
    got_total = b.make((5,))
    contrastive_par_factors.totals(
        q, *map(b.take, (loss_row, loss_col, dist_text, dist_image)), got_total
    )
    b.same("totals", got_total, want_total, each=True, tolerance=exact)
    for tau in (1e-6, 1.9, float("inf")):
        oracle.close(want_total, 0.5, tau, want_stats)
        got_stats = b.make((6,))
        contrastive_par_factors.close(b.take(want_total), 0.5, tau, got_stats)
        b.same(f"close {tau}", got_stats, want_stats, tolerance=exact)
    b.check_guards("totals, close")

    # gradients, by the same blocks; E is the oracle's, an infinity where the factor is 0
    want = [torch.zeros(m, d, **double), torch.zeros(total, d, **double)]
    oracle.gradients(p, that, ihat, alpha, beta, *want)
    nothing = (alpha == 0) & (p.weight <= 0)
    e[nothing] = torch.inf
    alpha_, beta_ = b.take(alpha), b.take(beta)
    for layout in ("contiguous", "padded"):
        stride = padded if layout == "padded" else total
        e_ = b.take(torch.zeros(m, stride), b.matrix)[:, :total]
        e_.copy_(e)
        g_text, g_image = b.make((m, d)), b.make((total, d))
        for k, (first, rows) in enumerate(blocks):
            part = slice(first, first + rows)
            arguments = (q, that_[part], ihat_, e_[part], first, alpha_, beta_)
            contrastive_par.gradients(*arguments, g_text[part], None, precision, True)
            contrastive_par.gradients(*arguments, None, g_image, precision, k > 0)
        b.same(f"gradients {layout} text", g_text, want[0])
        b.same(f"gradients {layout} image", g_image, want[1])
        b.check_guards("gradients")

    # fixup, onto something
    start = [0.1 * x for x in want]
    result = [x.clone() for x in start]
    oracle.fixup(p, that, ihat, row_fix, col_fix, *fixed, flagged, *result)
    arguments = [b.take(x) for x in (row_fix, col_fix, *fixed, flagged)]
    for keep in ((True, True), (True, False), (False, True)):
        got = [b.make(x.shape) if k else None for x, k in zip(start, keep, strict=True)]
        for x, y in zip(got, start, strict=True):
            if x is not None:
                x.copy_(y)
        contrastive_par_fix.fixup(q, that_, ihat_, *arguments, *got)
        for what, x, y in zip(("text", "image"), got, result, strict=True):
            if x is not None:
                b.same(f"fixup {what}", x, y, tolerance=5e-5)
        b.check_guards("fixup")

    # normalize_backward
    g_text, g_image = result[0], result[1][p.offset : p.offset + n]
    grad = torch.tensor(1.5, **double)
    want_stats[4:] = torch.tensor([1.0, 0.5])
    for keep in ((True, True), (True, False), (False, True)):
        want = [torch.zeros(m, d, **double), torch.zeros(n, d, **double)]
        want += [torch.zeros(m, **double), torch.zeros(n, **double)]
        got = [b.make(x.shape, case.dtype if k < 2 else torch.float32) for k, x in enumerate(want)]
        pick = [x if keep[k % 2] else None for k, x in enumerate(want)]
        common = (inv_text, inv_image, coef, want_stats, want_total, grad)
        oracle.normalize_backward(p, *common, 0.5, g_text, g_image, *pick)
        contrastive_par_rows.normalize_backward(
            q, *map(b.take, common), 0.5, b.take(g_text), b.take(g_image),
            *(x if keep[k % 2] else None for k, x in enumerate(got)),
        )  # fmt: skip
        rounding = {torch.float32: 5e-5, torch.float16: 1e-3}.get(case.dtype, 8e-3)
        for k, (x, y) in enumerate(zip(got, pick, strict=True)):
            if y is not None:
                what = "d_text d_image dot_text dot_image".split()[k]
                for rows in (slice(1), slice(1, None)):  # the first image's norm is tiny
                    b.same(f"normalize_backward {what}", x[rows], y[rows], tolerance=rounding)
        b.check_guards("normalize_backward")


def main() -> None:
    np.seterr(all="ignore")  # infinities and NaN are what the cases are about
    for name in sys.argv[1:] or CASES:
        run_case(name, CASES[name], "cpu", "ieee")
        print(name, flush=True)


if __name__ == "__main__":
    main()
