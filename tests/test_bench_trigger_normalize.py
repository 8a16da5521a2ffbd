"""What bench_trigger_normalize reports of providers that are right, wrong or missing."""

import argparse
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import _normalizers  # noqa: E402
import _targets  # noqa: E402
import _trigger_setting as settings  # noqa: E402
import bench_trigger_normalize as bench  # noqa: E402
from _common import Report  # noqa: E402

SHAPE = (3, 40, 36, 3)
OURS = ["pybackdoor", "pybackdoor_fresh"]


def make_report(device="cpu"):
    return Report(argparse.Namespace(rows=None, json=None, repeats=2, tiny=True, device=device))


@pytest.fixture
def report():
    return make_report()


def run(report, mode, case="blend", dtype=torch.float32):
    """Rows by provider of one setting."""
    bench.measure(mode, case, SHAPE, dtype, report, "eager")
    return {r["provider"]: r for r in report.rows}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", settings.CASES)
def test_forward_rows_have_errors_times_and_rates(report, case, dtype):
    rows = run(report, "forward", case, dtype)
    assert {*OURS, "eager", "compile", "compile_into"} <= set(rows)
    assert ("torchvision_normalize" in rows) == (case == "none")
    for name, row in rows.items():
        assert (row["mode"], row["case"], row["shape"]) == ("forward", case, "3x40x36x3")
        moved = math.prod(SHAPE) * (1 + dtype.itemsize)
        assert row["gbps"] == pytest.approx(moved / row["ms_median"] / 1e6)
        if case == "augment" and name not in OURS:  # its own coins
            assert row["rel_error"] is None and row["note"] == settings.OWN_NUMBERS
        else:
            limit = 4e-3 if dtype == torch.bfloat16 else 1e-5
            assert row["rel_error"] < limit + (settings.ONE_LEVEL if case == "warp" else 0)


@pytest.mark.parametrize("mode", ["backward", "full"])
def test_gradients_have_rows_in_both_modes(report, mode):
    rows = run(report, mode)
    extra = "eager_by_hand" if mode == "backward" else "pybackdoor_fresh"
    assert set(rows) == {"pybackdoor", "eager", "compile", extra}
    assert all(r["rel_error"] < 1e-5 and r["ms_median"] > 0 for r in rows.values())
    assert {(r["mode"], r["case"]) for r in rows.values()} == {(mode, "blend")}


def spoil(monkeypatch, kind, name, value):
    """The calls of one provider return something else."""
    make = kind.calls

    def calls(self, asked, backend):
        call = make(self, asked, backend)
        return (lambda: value(call())) if asked == name else call

    monkeypatch.setattr(kind, "calls", calls)


def put_nan(gradients):
    return gradients[0].index_fill(3, torch.tensor([2]), math.nan), gradients[1]


def move(gradients):
    return gradients[0], gradients[1] + 1e-4 * gradients[1].abs().max()


def run_out_of_memory(gradients):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (put_nan, "failed: ValueError: relative errors must be <= 1e-05, got {'eager': nan}"),
        (move, "failed: ValueError: relative errors must be <= 1e-05, got {'eager': "),
        (run_out_of_memory, "out of memory"),
    ],
)
def test_a_wrong_rival_is_reported_and_the_rest_timed(report, monkeypatch, change, note):
    spoil(monkeypatch, settings.Backward, "eager", change)
    rows = run(report, "backward")
    assert rows["eager"]["note"].startswith(note)
    assert rows["eager"]["ms_median"] in (None, math.inf) and rows["compile"]["ms_median"] > 0


@pytest.mark.parametrize("change", [put_nan, move, run_out_of_memory])
def test_our_own_failure_fails_the_run_after_the_others_rows(report, monkeypatch, change):
    spoil(monkeypatch, settings.Backward, "pybackdoor", change)
    with pytest.raises(ValueError, match="trigger_normalize backward blend float32: "):
        run(report, "backward")
    timed = [r["provider"] for r in report.rows if r["ms_median"] not in (None, math.inf)]
    assert timed == ["eager", "compile", "eager_by_hand"]


def test_missing_peers_are_noted_once_and_have_no_rows(monkeypatch, capsys):
    monkeypatch.setattr(bench, "missing", lambda package: f"{package} is not installed")
    monkeypatch.setattr(bench, "TINY", [("forward", "none", SHAPE, torch.float32)] * 2)
    monkeypatch.setattr(sys, "argv", ["bench", "--tiny", "--repeats", "1"])
    bench.main()
    text = capsys.readouterr().out
    for name in ("kornia", "torchvision"):  # the others run on CUDA
        note = f"{name} is not installed: {name}_normalize left out"
        assert text.count(note) == text.count(f"{name}_normalize") == 1
    assert "dali" not in text and set(_normalizers.NORMALIZERS) >= {"dali_normalize"}


def test_every_target_is_of_a_setting_that_quick_measures():
    wanted = [t for t in _targets.TARGETS if t.kernel == bench.KERNEL]
    assert len(wanted) == 12
    measured = {
        (device, mode, case, "x".join(map(str, shape)), str(dtype).removeprefix("torch."))
        for device, quick in (("cpu", bench.CPU_QUICK), ("cuda", bench.CUDA_QUICK))
        for mode, case, shape, dtype in quick
    }
    for t in wanted:
        assert (t.device, t.mode, t.case, t.shape, t.dtype) in measured
        assert set(t.against) <= {"eager", "compile"}


@pytest.mark.gpu
@pytest.mark.parametrize("mode", list(settings.MODES))
def test_the_triton_kernels_have_rows_on_a_gpu(mode):
    rows = run(make_report("cuda"), mode)
    assert rows["triton"]["ms_median"] > 0 and rows["triton"]["note"] is None
