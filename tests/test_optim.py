"""AdamWEma: a drop-in for torch.optim.AdamW, its state dicts, and what it adds."""

import copy
import pickle

import pytest
import torch
from torch import nn

from pybackdoor.optim import AdamWEma

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def the_same_convolutions():
    """Two models that are trained alike get the same gradients, bit for bit."""
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False):
        yield


@pytest.fixture(params=["", "lanes32"])
def isa(request, monkeypatch):
    """torch's fused AdamW, and the body shared with CUDA."""
    monkeypatch.setenv("PYBACKDOOR_CPU_ISA", request.param)
    return request.param


def make_model(device="cpu"):
    """Channels-last weights, vectors, an empty parameter, one without gradient, buffers."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.norm = nn.BatchNorm2d(3, affine=False)
    model.conv = nn.Conv2d(3, 8, 3)
    model.rest = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    model = model.to(device, memory_format=torch.channels_last)
    model.unused = nn.Parameter(torch.ones(7, device=device))
    model.empty = nn.Parameter(torch.ones(0, device=device))
    return model


def backward(model, seed):
    generator = torch.Generator().manual_seed(seed)
    device = model.unused.device
    x = torch.randn(4, 3, 8, 8, generator=generator).to(device)
    model.zero_grad()
    out = model(x)
    ((out - 1).square().mean() + model.empty.sum()).backward()


def train(model, optimizer, steps, first=0):
    for k in range(first, first + steps):
        backward(model, k)
        optimizer.step()


def groups(model):
    """Two groups with settings of their own."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    return [
        {"params": decayed, "lr": 1e-2, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "betas": (0.8, 0.99)},
    ]


def assert_same(a, b, isa=""):
    for p, q in zip(a, b, strict=True):
        if isa == "" and p.device.type == "cpu":
            assert torch.equal(p, q)
        else:
            assert torch.allclose(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_it_is_torch_adamw(device, isa):
    mine, theirs = make_model(device), make_model(device)
    ours = AdamWEma(groups(mine), lr=3e-3)
    torchs = torch.optim.AdamW(groups(theirs), lr=3e-3, fused=True)
    train(mine, ours, 10)
    train(theirs, torchs, 10)
    assert_same(mine.parameters(), theirs.parameters(), isa)
    a, b = ours.state_dict(), torchs.state_dict()
    assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys()
    for k, state in b["state"].items():
        assert list(a["state"][k]) == list(state)  # step, exp_avg, exp_avg_sq
        assert_same(a["state"][k].values(), state.values(), isa)
        assert [t.dtype for t in a["state"][k].values()] == [t.dtype for t in state.values()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [True, False])
def test_state_dicts_load_both_ways(device, fused, isa):
    """After 3 steps of one, 3 of the other equal 6 of torch's, to the last bits."""
    straight, there, back = make_model(device), make_model(device), make_model(device)
    straight_optimizer = torch.optim.AdamW(groups(straight), lr=3e-3, fused=fused)
    train(straight, straight_optimizer, 6)

    first = torch.optim.AdamW(groups(there), lr=3e-3, fused=fused)
    train(there, first, 3)
    second = AdamWEma(groups(there), lr=1.0)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    assert second.param_groups[0]["fused"] is True
    train(there, second, 3, first=3)
    assert_same(straight.parameters(), there.parameters(), isa if fused else "other")

    first = AdamWEma(groups(back), lr=3e-3, ema_decay=0.9)
    train(back, first, 3)
    second = torch.optim.AdamW(groups(back), lr=1.0, fused=fused)
    second.load_state_dict(first.state_dict())
    train(back, second, 3, first=3)
    assert_same(straight.parameters(), back.parameters(), isa if fused else "other")


@pytest.mark.parametrize("device", DEVICES)
def test_its_own_state_continues_bit_for_bit(device, isa):
    """Averages, references, noise: a run that is saved, loaded and copied goes on as if nothing."""
    settings = dict(lr=1e-2, ema_decay=0.8, radius=0.05, clip_norm=0.5)
    settings |= dict(shadow=True, noise_std=0.01, seed=3)
    model = make_model(device)
    optimizer = AdamWEma(groups(model), **settings)
    train(model, optimizer, 3)
    saved_model = copy.deepcopy(model.state_dict())
    saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
    assert list(saved["state"][0]) == ["step", "exp_avg", "exp_avg_sq", "ema", "reference"]
    train(model, optimizer, 3, first=3)

    other = make_model(device)
    other.load_state_dict(saved_model)
    resumed = AdamWEma(groups(other), **settings)
    resumed.load_state_dict(saved)
    train(other, resumed, 3, first=3)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in ((optimizer.ema_parameters(), resumed.ema_parameters()),
                 (optimizer.shadow_parameters(), resumed.shadow_parameters())):  # fmt: skip
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    twin_model, twin = copy.deepcopy((other, resumed))
    train(twin_model, twin, 1, first=6)
    train(other, resumed, 1, first=6)
    for a, b in zip(twin_model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_averages_of_the_weights(device, isa):
    model = make_model(device)
    optimizer = AdamWEma(model.parameters(), lr=1e-2, ema_decay=0.75)
    want = [p.detach().clone() for p in model.parameters()]
    for k in range(4):
        train(model, optimizer, 1, first=k)
        torch._foreach_lerp_(want, [p.detach() for p in model.parameters()], 0.25)
    averages = optimizer.ema_parameters()
    for a, b in zip(averages, want, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)
    state = optimizer.ema_state_dict(model)
    assert state.keys() == model.state_dict().keys()
    assert (
        state["conv.weight"]
        is averages[[n for n, _ in model.named_parameters()].index("conv.weight")]
    )
    assert state["norm.running_mean"] is model.state_dict()["norm.running_mean"] or torch.equal(
        state["norm.running_mean"], model.norm.running_mean
    )
    averaged = make_model(device)
    averaged.load_state_dict(state)
    assert torch.equal(averaged.unused, model.unused)  # never had a gradient: stands for itself


@pytest.mark.parametrize("device", DEVICES)
def test_a_parameter_that_misses_a_step(device, isa):
    """AdamW leaves it alone and does not count; its average goes on, as does the ball."""
    a, b = (nn.Parameter(torch.full((5,), float(k), device=device)) for k in (1, 2))
    optimizer = AdamWEma([a, b], lr=0.5, weight_decay=0.0, ema_decay=0.5, shadow=True)
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer.step()
    b.grad = None
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in (a, b)] == [2, 1]
    assert torch.allclose(a, torch.zeros_like(a), atol=1e-6)
    assert torch.allclose(b, torch.full_like(b, 1.5), atol=1e-6)
    # Averages: 1 -> 0.75 -> 0.375; 2 -> 1.75 -> 1.625.
    for average, value in zip(optimizer.ema_parameters(), (0.375, 1.625), strict=True):
        assert torch.allclose(average, torch.full_like(average, value), atol=1e-6)
    for shadow, p in zip(optimizer.shadow_parameters(), (a, b), strict=True):
        assert torch.equal(shadow, p.detach().bfloat16())


@pytest.mark.parametrize("device", DEVICES)
def test_the_ball_is_around_the_weights_at_construction(device, isa):
    model = make_model(device)
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = AdamWEma(model.parameters(), lr=1e-2, radius=0.03)
    train(model, optimizer, 5)
    pairs = zip(model.parameters(), start, strict=True)
    parts = [(p.detach().double() - s.double()).norm().square() for p, s in pairs]
    assert torch.stack(parts).sum().sqrt().item() == pytest.approx(0.03, rel=1e-5)
    assert optimizer.status.distance.item() > 0.03


@pytest.mark.parametrize("device", DEVICES)
def test_steps_that_are_not_finite_are_skipped_and_counted(device, isa):
    model = make_model(device)
    optimizer = AdamWEma(model.parameters(), lr=1e-2, skip_nonfinite=True, ema_decay=0.5)
    assert optimizer.skipped_steps.item() == 0
    train(model, optimizer, 2)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    backward(model, 9)
    model.conv.weight.grad[0, 0, 0, 0] = float("nan")
    optimizer.step()
    assert optimizer.skipped_steps.item() == 1 and optimizer.status.skipped.item() == 1
    for k, state in before[1].items():
        for name, value in state.items():
            assert torch.equal(value, optimizer.state_dict()["state"][k][name])
    assert all(torch.equal(v, before[0][k]) for k, v in model.state_dict().items() if "conv" in k)
    train(model, optimizer, 1)
    assert optimizer.skipped_steps.item() == 1 and optimizer.status.skipped.item() == 0


@pytest.mark.parametrize("device", DEVICES)
def test_with_a_grad_scaler(device, isa):
    """The scaler leaves unscaling and skipping to the optimizer; gradients stay as they are."""
    results = []
    for kind in ("plain", "scaled"):
        model = make_model(device)
        optimizer = AdamWEma(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**12, enabled=kind == "scaled")
        for k in range(3):
            model.zero_grad()
            x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(k)).to(device)
            scaler.scale((model(x) - 1).square().mean()).backward()
            if kind == "scaled" and k == 1:
                model.conv.bias.grad[0] = float("inf")
            elif k == 1:
                continue
            scaler.step(optimizer)
            scaler.update()
        results.append(list(model.parameters()))
        assert optimizer.skipped_steps.item() == (kind == "scaled")
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


def test_closure_scheduler_and_autograd():
    weight = nn.Parameter(torch.ones(2))
    optimizer = AdamWEma([weight], lr=0.1, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)

    def closure():
        optimizer.zero_grad()
        loss = weight.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2
    scheduler.step()
    saved = (weight * weight).sum()  # saves the weight, which the next step changes
    optimizer.step(closure)
    assert torch.allclose(weight, torch.full((2,), 0.89))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_autograd_learns_of_kernels_that_write_through_addresses(monkeypatch):
    monkeypatch.setenv("PYBACKDOOR_CPU_ISA", "lanes32")
    test_closure_scheduler_and_autograd()


def test_the_table_is_made_once_while_addresses_stay(monkeypatch):
    monkeypatch.setenv("PYBACKDOOR_CPU_ISA", "lanes32")
    model = make_model()
    optimizer = AdamWEma(model.parameters(), lr=1e-2)
    backward(model, 0)
    optimizer.step()
    table = optimizer._tables._table
    optimizer.step()
    assert optimizer._tables._table is table
    model.conv.weight.grad = model.conv.weight.grad.clone()
    optimizer.step()
    assert optimizer._tables._table is not table


BAD = [
    (
        lambda: [torch.ones(2, dtype=torch.bfloat16)],
        {},
        TypeError,
        "parameter 0 of group 0 .*float32",
    ),
    (
        lambda: [torch.ones(2, dtype=torch.cfloat)],
        {},
        TypeError,
        "must be float32, got torch.compl",
    ),
    (lambda: [torch.ones(4)[::2]], {}, ValueError, "must fill its memory without gaps"),
    (lambda: [torch.ones(2)], {"clip_norm": -1.0}, ValueError, "clip_norm must be positive"),
    (lambda: [torch.ones(2)], {"noise_std": 0.1}, ValueError, "noise_std needs shadow=True"),
    (lambda: [torch.ones(2)], {"ema_decay": 1.0}, ValueError, "ema_decay must be in"),
    (
        lambda: [{"params": [torch.ones(2)], "maximize": True}],
        {},
        ValueError,
        "maximize must be Fal",
    ),
]


@pytest.mark.parametrize("params, settings, error, message", BAD)
def test_bad_arguments_are_named(params, settings, error, message):
    with pytest.raises(error, match=f"^adamw_ema: .*{message}"):
        AdamWEma(params(), lr=0.1, **settings)


def test_bad_gradients_state_dicts_and_questions():
    weight = nn.Parameter(torch.ones(2))
    optimizer = AdamWEma([weight], lr=0.1)
    weight.grad = torch.ones(2).to_sparse()
    with pytest.raises(TypeError, match="adamw_ema: a gradient must be a dense tensor"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="no averages, as ema_decay was not given"):
        optimizer.ema_parameters()
    with pytest.raises(RuntimeError, match="no bfloat16 copies, as shadow=True was not given"):
        optimizer.shadow_parameters()
    weight.grad = torch.ones(2)
    for kind, settings in (("Adam", {}), ("AdamW", {"amsgrad": True})):
        other = getattr(torch.optim, kind)([weight], lr=0.1, **settings)
        with pytest.raises(ValueError, match="must be (True|False) in every group"):
            optimizer.load_state_dict(other.state_dict())
    optimizer.step()  # as if nothing had been


@pytest.mark.gpu
def test_steps_in_a_cuda_graph_equal_eager_steps(monkeypatch):
    """The table of a captured step is its own; lr and step counts are read at each replay."""
    results = []
    for captured in (False, True):
        lr = torch.tensor(1e-2, device="cuda")
        model = make_model("cuda")
        optimizer = AdamWEma(model.parameters(), lr=lr, clip_norm=0.5, ema_decay=0.9)
        backward(model, 0)
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            with pytest.raises(RuntimeError, match="run one as warm-up before each capture"):
                optimizer.step()
        optimizer.step()
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
        for k in range(3):
            lr.fill_(1e-2 / (k + 1))
            graph.replay() if captured else optimizer.step()
        results.append([*model.parameters(), *optimizer.ema_parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
