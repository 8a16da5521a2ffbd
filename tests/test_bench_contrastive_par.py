"""What bench_contrastive_par reports of providers that are right, wrong, too large or missing."""

import argparse
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_contrastive_par as bench  # noqa: E402
from _common import Report  # noqa: E402
from _contrastive_setting import Setting  # noqa: E402
from _peers import PEERS, Unfit  # noqa: E402

SHAPE = (12, 16)


@pytest.fixture
def report():
    options = argparse.Namespace(rows=None, json=None, repeats=2, tiny=True)
    return Report(options)


def scaled(factor):
    """A provider whose gradients, and loss, are `factor` times what they should be."""
    return lambda self, text, image, log_scale: factor * self.loss("eager")(text, image, log_scale)


def out_of_memory(self, text, image, log_scale):
    raise torch.OutOfMemoryError("CUDA out of memory")


def run(report, monkeypatch, changed, names, **arguments):
    """measure() with some providers' losses changed."""
    plain = Setting.loss

    def loss(self, name, backend="inductor"):
        change = changed.get(name)
        return plain(self, name, backend) if change is None else change.__get__(self)

    monkeypatch.setattr(Setting, "loss", loss)
    arguments = {"device": "cpu", "case": "clip", "modes": ("full",)} | arguments
    device, case, modes = arguments.values()
    bench.measure(SHAPE, torch.float32, device, case, names, modes, report, "aot_eager")
    return {(r["provider"], r["mode"]): r for r in report.rows}


def test_wrong_and_oversized_peers_are_reported_and_the_rest_timed(report, monkeypatch):
    changed = {"open_clip": scaled(1.01), "eager_shared": out_of_memory}
    names = ["pybackdoor", "eager", "eager_shared", "open_clip", "memeff"]
    rows = run(report, monkeypatch, changed, names)
    wrong, large = rows["open_clip", "full"], rows["eager_shared", "full"]
    assert wrong["ms_median"] is None and wrong["note"].startswith(
        "failed: wrong numbers: loss 1.0"
    )
    assert wrong["rel_error"] == pytest.approx(0.01, rel=1e-3)
    assert large["ms_median"] == math.inf and large["note"] == "out of memory"
    assert rows["eager", "full"]["ms_median"] > 0 and rows["pybackdoor", "full"]["tflops"] > 0
    assert ("memeff", "full") not in rows
    assert "memeff left out: needs a CUDA device" in report.notes


@pytest.mark.parametrize("change", [scaled(1.01), scaled(float("nan")), out_of_memory])
def test_our_own_wrong_numbers_fail_the_run_after_the_others_rows(report, monkeypatch, change):
    with pytest.raises(ValueError, match="contrastive_par \\(12, 16\\) float32 clip: "):
        run(report, monkeypatch, {"pybackdoor": change}, ["pybackdoor", "eager"])
    assert [r["provider"] for r in report.rows if r["ms_median"] not in (None, math.inf)] == [
        "eager"
    ]


def test_each_mode_has_the_error_of_what_it_gives(report, monkeypatch):
    names, modes = ["pybackdoor", "eager", "compile"], ("forward", "backward", "full")
    rows = run(report, monkeypatch, {}, names, case="par", modes=modes)
    for name in names[:2]:
        for mode in modes:
            row = rows[name, mode]
            assert row["rel_error"] < 1e-5 and row["case"] == "par"
            assert (row["tflops"] is not None) == (mode == "full")
    assert ("compile", "full") in rows


def test_peers_do_the_same_task():
    setting = Setting((64, 32), torch.float32, "cpu")
    exact = setting.exact()
    for name in PEERS:
        try:
            result = bench.full(setting.loss(name), setting.leaves)
        except (Unfit, ImportError):
            continue
        assert bench.worst(exact.errors(*result)) < 1e-5, name
    with pytest.raises(Unfit, match="needs D % 256 = 0, got 32"):
        PEERS["inf_cl"].make("cuda", 32)


def test_on_cuda_replays_peaks_and_launches_are_rows(report, monkeypatch):
    """The path of a GPU, with its tensors and its clock on the host."""
    made = Setting.__init__

    def on_host(self, shape, dtype, device, case):
        made(self, shape, dtype, "cpu", case)
        self.device = "cuda"

    def leaves(self, seed):
        self.device = "cpu"
        try:
            return original(self, seed)
        finally:
            self.device = "cuda"

    original = Setting.make_leaves
    monkeypatch.setattr(Setting, "__init__", on_host)
    monkeypatch.setattr(Setting, "make_leaves", leaves)
    monkeypatch.setattr(bench, "ceilings", lambda device, tiny: {"tflops": 1.0, "gbps": 1.0})
    monkeypatch.setattr(bench, "peak_growth", lambda call, device: call() and 123)
    monkeypatch.setattr(bench, "count_launches", lambda call: call() and 8)
    monkeypatch.setattr(bench, "cold_sets", lambda size, device: 3)
    monkeypatch.setattr(bench, "captured", lambda calls, device: lambda: [c() for c in calls])
    monkeypatch.setattr(bench, "span_ms", lambda calls, device: 1.0)
    spans = {}

    def interleave(variants, device, *, repeats, per_call, warmup):
        for name, calls in variants.items():
            spans[name] = len(calls), per_call.get(name, 1)
            for call in calls:
                call()
        return dict.fromkeys(variants, (1.0, 1.0, 1.0))

    monkeypatch.setattr(bench, "interleave", interleave)
    rows = run(report, monkeypatch, {}, ["pybackdoor", "eager", "open_clip"], device="cuda")
    wanted = {"pybackdoor": (3, 1), "eager": (3, 1), "open_clip": (3, 1)}
    assert spans == wanted | {"pybackdoor_graph": (1, 3), "eager_graph": (1, 3)}
    assert rows["pybackdoor", "full"]["peak_bytes"] == 123
    assert rows["pybackdoor", "full"]["launches"] == 8
    replay = rows["pybackdoor_graph", "full"]
    assert replay["peak_bytes"] is None and replay["precision"] == "fp32"
    assert replay["rel_error"] == rows["pybackdoor", "full"]["rel_error"]


def test_a_provider_that_may_not_fit_is_not_run(report, monkeypatch):
    report.options.threads = 1
    monkeypatch.setattr(bench, "available_bytes", lambda: 1 << 20)
    bench.memory("eager", (4096, 512), report)
    assert report.rows[0]["peak_bytes"] is None
    assert report.rows[0]["note"] == "not run: may need 0.3 GB, 0.0 GB are free"
