"""What bench_adamw_ema reports of providers that are right, wrong, too large or missing."""

import argparse
import math
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import _targets  # noqa: E402
import bench_adamw_ema as bench  # noqa: E402
from _common import Report  # noqa: E402

NAMES = ["pybackdoor", "triton", "torch_fused", "torch_foreach", "apex_swa"]


@pytest.fixture
def report():
    return Report(argparse.Namespace(rows=None, json=None, repeats=2, tiny=True))


def run(report, monkeypatch, changed=(), names=tuple(NAMES), case="ema"):
    """measure() with something done after the steps of some providers; rows by provider."""
    make, changed = bench.make_provider, dict(changed)

    def make_changed(name, *arguments):
        provider = make(name, *arguments)
        step = provider.step
        if name in changed:
            provider.step = lambda: (step(), changed[name](provider))
        return provider

    monkeypatch.setattr(bench, "make_provider", make_changed)
    bench.measure(case, "tiny", list(names), report, "cpu", "eager")
    return {r["provider"]: r for r in report.rows}


@torch.no_grad()
def move_a_weight(provider):
    provider.params[3][1] += 1e-5


@torch.no_grad()
def put_nan(provider):
    provider.params[0][2] = math.nan


def keep_no_average(provider):
    for average, p in zip(provider.averages, provider.params, strict=True):
        average.copy_(p.detach())


def keep_old_copies(provider):
    provider.shadows[1].zero_()


def run_out_of_memory(provider):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("case", bench.CASES)
def test_rows_have_errors_times_and_rates(report, monkeypatch, case):
    rows = run(report, monkeypatch, case=case)
    assert set(rows) == {"pybackdoor", "torch_fused", "torch_foreach"}
    parameters = sum(torch.Size(s).numel() for s in bench.SHAPES["tiny"])
    assert 2000 < parameters < 20_000
    for row in rows.values():
        assert row["mode"] == "full" and row["case"] == case and row["shape"] == "tiny"
        assert 0 < row["rel_error"] < 1e-4
        moved = bench.BYTES[case] * parameters
        assert row["gbps"] == pytest.approx(moved / row["ms_median"] / 1e6)
    assert f"triton left out in case {case}: needs a CUDA device" in report.notes


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (move_a_weight, "relative errors must be <= 0.001, got {'torch_fused': 0.00"),
        (put_nan, "relative errors must be <= 0.001, got {'torch_fused': nan}"),
        (keep_no_average, "relative errors must be <= 0.1"),
        (keep_old_copies, "torch_fused: the bf16 copies are not those of the weights"),
    ],
)
def test_a_wrong_rival_is_reported_and_the_rest_timed(report, monkeypatch, change, note):
    rows = run(report, monkeypatch, {"torch_fused": change})
    assert rows["torch_fused"]["note"].startswith(f"failed: ValueError: {note}")
    assert rows["torch_fused"]["ms_median"] is None and rows["pybackdoor"]["ms_median"] > 0


@pytest.mark.parametrize("change", [move_a_weight, put_nan, keep_old_copies, run_out_of_memory])
def test_our_own_failure_fails_the_run_after_the_others_rows(report, monkeypatch, change):
    with pytest.raises(RuntimeError, match="pybackdoor, case ema: "):
        run(report, monkeypatch, {"pybackdoor": change})
    timed = [r["provider"] for r in report.rows if r["ms_median"] not in (None, math.inf)]
    assert timed == ["torch_fused", "torch_foreach"]


def test_every_target_is_of_a_provider_and_a_setting_that_has_rows():
    wanted = [t for t in _targets.TARGETS if t.kernel == bench.KERNEL]
    assert len(wanted) == 4
    names = {*bench.NAMES, *(f"{n}_graph" for n in bench.NAMES if n != "apex_swa")}
    for t in wanted:
        assert t.shape in bench.SHAPES and t.case in bench.CASES and set(t.against) <= names
        assert (t.mode, t.dtype) == ("full", "float32")


def test_a_forced_backend_is_taken_back(monkeypatch):
    for before in (None, "reference"):
        if before:
            monkeypatch.setenv("PYBACKDOOR_BACKEND", before)
        with bench.forced("triton"):
            assert os.environ["PYBACKDOOR_BACKEND"] == "triton"
        assert os.environ.get("PYBACKDOOR_BACKEND") == before


@pytest.mark.gpu
def test_replays_and_the_triton_kernels_on_a_gpu(report):
    bench.measure("ema", "tiny", ["pybackdoor", "triton", "torch_fused"], report, "cuda", "eager")
    rows = {r["provider"]: r for r in report.rows}
    names = ["pybackdoor", "triton", "torch_fused"]
    assert set(rows) == {*names, *(f"{n}_graph" for n in names)}
    assert all(r["ms_median"] > 0 and r["note"] is None for r in rows.values())
    assert rows["pybackdoor"]["launches"] < rows["torch_fused"]["launches"]
