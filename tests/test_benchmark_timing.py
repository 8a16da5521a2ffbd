"""The benchmarks' timing, with a GPU's events and graphs acted out; memory; the exact answer."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import _memory  # noqa: E402
import _timing  # noqa: E402
from _contrastive_eager import OneDnnProduct, exact, two_products  # noqa: E402


class Clock:
    """A GPU whose calls take the milliseconds that they say."""

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        clock = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = clock.now

            def elapsed_time(self, end):
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        cache = SimpleNamespace(L2_cache_size=50)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: cache)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def call(self, name, ms):
        def run():
            self.now += ms
            self.log.append(name)

        return run


def test_times_are_of_one_run_however_many_a_span_holds(monkeypatch):
    clock = Clock(monkeypatch)
    variants = {
        "short": clock.call("short", 0.01),
        "long": clock.call("long", 40.0),
        "sets": [clock.call(f"set{i}", 0.5 + i) for i in range(4)],
        "replay": [clock.call("replay", 6.0)],
    }
    found = _timing.interleave(variants, "cuda", repeats=3, per_call={"replay": 12})
    wanted = {"short": 0.01, "long": 40.0, "sets": 2.0, "replay": 0.5}
    assert {k: v[0] for k, v in found.items()} == pytest.approx(wanted)
    runs = {name: clock.log.count(name) for name in ("short", "long", "set0", "set3")}
    # 3 spans, 2 warm-up runs and 3 for the estimate; set3 has no part in that.
    assert runs == {"short": 305, "long": 8, "set0": 6, "set3": 5}


def test_sets_of_tensors_exceed_the_cache_three_times(monkeypatch):
    Clock(monkeypatch)
    for size in (1, 7, 10, 149, 150, 1000):
        sets = _timing.cold_sets(size, "cuda", limit=1000)
        assert (sets - 1) * size >= 150 and (sets - 2) * size < 150
    assert _timing.cold_sets(1, "cuda") == 64 and _timing.cold_sets(1, "cpu") == 1


def test_growth_of_the_peak_is_what_a_call_needs():
    def call():
        x = torch.ones(64 << 20, dtype=torch.uint8)
        del x
        return torch.ones(16 << 20, dtype=torch.uint8)

    assert 60 << 20 <= _memory.peak_growth(call, "cpu") <= 90 << 20


def test_a_fresh_process_gives_its_value_its_error_or_its_end():
    assert _memory.in_fresh_process(abs, -3) == 3
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        _memory.in_fresh_process(divmod, 1, 0)
    with pytest.raises(RuntimeError, match="exit code"):
        _memory.in_fresh_process(_die)


def _die():
    import os

    os._exit(9)


@pytest.mark.parametrize("case", ["clip", "par", "closed"])
def test_the_exact_answer_is_autograds(case, monkeypatch):
    import _contrastive_eager

    monkeypatch.setitem(_contrastive_eager.BLOCK, "cpu", 100)  # several blocks of 2 rows
    g = torch.Generator().manual_seed(1)
    text, image = (torch.randn(37, 24, generator=g, dtype=torch.float64) for _ in range(2))
    leaves = [x.requires_grad_() for x in (text, image, torch.tensor(3.0, dtype=torch.float64))]
    refs = None
    if case != "clip":
        refs = [F.normalize(torch.randn(37, 24, generator=g), dim=1) for _ in range(2)]
    tau = 0.5 if case == "closed" else 4.0
    units = [F.normalize(x, dim=1) for x in leaves[:2]]
    loss = two_products(*units, leaves[2].exp())
    for unit, ref in zip(units, refs or (), strict=False):
        distance = (unit - ref.double()).square().sum(1).mean()
        loss = loss - 0.5 * distance * (distance <= tau)
    grads = torch.autograd.grad(loss, leaves)
    found = exact(leaves[0], leaves[1], leaves[2].exp(), refs, 0.5, tau)
    assert max(found.errors(loss, grads).values()) < 1e-12
    assert max(found.errors(loss, (2 * grads[0], None, None)).values()) == pytest.approx(1)


def test_the_onednn_product_has_the_products_gradients():
    g = torch.Generator().manual_seed(2)
    x, y = (torch.randn(n, 9, generator=g, requires_grad=True) for n in (7, 5))
    weight = torch.randn(7, 5, generator=g)
    wanted = torch.autograd.grad((x @ y.T * weight).sum(), (x, y))
    found = torch.autograd.grad((OneDnnProduct.apply(x, y) * weight).sum(), (x, y))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
