"""Large fp32 products by oneDNN: the error of torch's own, and nothing else is touched."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pybackdoor.engine.towers import Encoder
from pybackdoor.ops import _matmul
from pybackdoor.ops._matmul import fast_products

needs_onednn = pytest.mark.skipif(_matmul._onednn() is None, reason="torch without oneDNN")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def another_maker(monkeypatch):
    monkeypatch.setattr(_matmul, "_intel", lambda: False)


class Seen:
    """oneDNN's op, counting its calls."""

    def __init__(self):
        self.op, self.calls = _matmul._onednn(), 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.op(*arguments)


@pytest.fixture
def seen(monkeypatch):
    op = Seen()
    monkeypatch.setattr(_matmul, "_onednn", lambda: op)
    return op


def layers(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256, bias=False)).to(dtype)


def run(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    rows = model(x)
    (rows * torch.linspace(-1, 1, rows.numel(), dtype=rows.dtype).view_as(rows)).sum().backward()
    return [rows.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


@needs_onednn
@pytest.mark.parametrize("shape", [(512, 256), (4, 130, 256)])  # 2-D, and rows of tokens
def test_the_error_is_that_of_torch(shape, seen):
    model, x = layers(), torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    exact = run(layers(torch.float64), x.double())
    plain = run(model, x)
    with fast_products(model):
        got = run(model, x)
    assert seen.calls == 4  # two layers, and the gradients of their inputs
    # Root mean squares: the largest of 1e5 errors is one unlucky sum, whose order differs.
    for want, one, two in zip(exact, plain, got, strict=True):
        assert (two - want).square().mean().sqrt() <= 2 * (one - want).square().mean().sqrt()


@needs_onednn
@pytest.mark.parametrize(
    "model, x",
    [
        (layers(), torch.randn(64, 256)),  # small products
        (nn.Linear(255, 4096), torch.randn(512, 255)),  # no wide weight
        (layers(torch.float64), torch.randn(512, 256).double()),
        (layers(torch.bfloat16), torch.randn(512, 256).bfloat16()),
        (layers(), torch.randn(256, 512).T),  # by columns
    ],
)
def test_what_gains_nothing_is_left_alone(model, x, seen):
    with torch.no_grad(), fast_products(model):
        got = model(x)
    before = seen.calls
    with torch.no_grad():
        want = model(x)
    assert torch.equal(got, want) or (x.stride(0) == 1 and before == 1)
    assert before == (1 if x.stride(0) == 1 else 0)  # the second layer's input lies in rows


@needs_onednn
def test_autocast_keeps_its_precision(seen):
    model, x = layers(), torch.randn(512, 256)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        want = model(x)
        with fast_products(model):
            got = model(x)
    assert torch.equal(got, want) and seen.calls == 0


@needs_onednn
def test_other_modes_see_what_they_expect(seen):
    model, x = layers(), torch.randn(512, 256)
    with FlopCounterMode(display=False) as counter, fast_products(model):
        model(x)
    assert counter.get_total_flops() == 2 * 2 * 512 * 256 * 512 and seen.calls == 0

    class Names(TorchDispatchMode):
        names: list = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func)
            return func(*args, **(kwargs or {}))

    with fast_products(model), Names(), torch.no_grad():
        model(x)
    assert torch.ops.aten.addmm.default in Names.names and seen.calls == 2


@needs_onednn
def test_on_intels_cpus_products_are_torchs_own(seen, monkeypatch):
    model, x = layers(), torch.randn(512, 256)
    monkeypatch.setattr(_matmul, "_intel", lambda: True)
    with fast_products(model), torch.no_grad():
        assert torch.equal(model(x), layers()(x))
    assert torch.equal(_matmul.matmul_nt(x, x), x @ x.T) and seen.calls == 0
    monkeypatch.setattr(_matmul, "_intel", lambda: False)
    _matmul.matmul_nt(x, x)
    assert seen.calls == 1


@pytest.mark.parametrize("maker", ["GenuineIntel", "AuthenticAMD"])
@pytest.mark.parametrize("linux", [True, False])
def test_the_maker_is_known(maker, linux, monkeypatch):
    def read_text(*about, **options):
        if not linux:
            raise FileNotFoundError
        return f"processor: 0\nvendor_id\t: {maker}\n"

    monkeypatch.undo()  # of what stands in for it
    monkeypatch.setattr(_matmul.Path, "read_text", read_text)
    monkeypatch.setattr(_matmul.platform, "processor", lambda: f"Family 6, {maker}")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert _matmul._intel.__wrapped__() == (maker == "GenuineIntel")


def test_without_onednn_nothing_changes(monkeypatch):
    monkeypatch.setattr(_matmul, "_onednn", lambda: None)
    model, x = layers(), torch.randn(512, 256)
    with fast_products(model), torch.no_grad():
        got = model(x)
    assert torch.equal(got, model(x))


@needs_onednn
@pytest.mark.parametrize(
    "encode, wanted",
    [
        (Encoder(None, CPU), 2),
        (Encoder(torch.bfloat16, CPU), 0),
        (Encoder(None, CPU, "default"), 0),
        (Encoder(None, torch.device("cuda")), 0),
    ],
)
def test_an_encoder_asks_for_it_where_it_may(encode, wanted, seen):
    model, x = layers(), torch.randn(512, 256)
    with encode.products(model), torch.no_grad():
        model(x)
    assert seen.calls == wanted


@needs_onednn
def test_errors_leave_no_mode_behind(seen):
    model = layers()
    with pytest.raises(RuntimeError, match="shapes"), fast_products(model):
        model(torch.randn(512, 255))
    model(torch.randn(512, 256))
    assert seen.calls == 0


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_other_devices_have_torchs_own_product(seen, device):
    a, b = torch.ones(3, 5, device=device), torch.ones(4, 5, device=device)
    assert _matmul.matmul_nt(a, b).shape == (3, 4) and seen.calls == 0
