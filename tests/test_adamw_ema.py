"""adamw_ema: every backend that needs no GPU against fp64, torch's fused AdamW and each other."""

import copy
import math
import sys

import pytest
import torch
from adamw_ema_cases import (
    ALL,
    OP_MODULE,
    flattened,
    largest_differences,
    native_step,
    random_slots,
    reference_step,
    two_groups,
)

from pybackdoor import reference
from pybackdoor.ops import _adamw_ema_table as tables
from pybackdoor.ops import adamw_ema
from pybackdoor.reference import noise_normals

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# What runs on the CPU: torch's fused AdamW, or the body shared with CUDA on the host; 256 lanes are
# CUDA's block.
ISAS = ["", "lanes1", "lanes32", "lanes256"]
ULP = 2.0**-23


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("PYBACKDOOR_CPU_ISA", request.param)
    return request.param


def lists(slots, device="cpu"):
    """The slots as the op's arguments, on a device."""
    columns = list(zip(*(slot[:8] for slot in slots), strict=True))
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "emas", "shadows", "references")
    moved = [[t if t is None else t.to(device) for t in column] for column in columns]
    return {n: c for n, c in zip(names, moved, strict=True) if n == "grads" or c[0] is not None}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_many_steps_stay_as_close_to_fp64_as_torch_fused(device, clip_norm, isa):
    """With decay, clipping, unscaling and averages; torch's own error in fp32 is the measure."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(40, 50), (8192 + 77,), (3,)]
    params = [torch.randn(s, generator=generator) for s in shapes]
    exact = [p.double() for p in params]
    plain = [p.clone().requires_grad_() for p in params]
    ours = [p.clone().to(device) for p in params]
    optimizer = torch.optim.AdamW(plain, lr=1e-2, weight_decay=0.1, fused=True)
    wide = torch.optim.AdamW([p.requires_grad_() for p in exact], lr=1e-2, weight_decay=0.1)
    zeros = lambda: [torch.zeros_like(p) for p in ours]  # noqa: E731
    state = (zeros(), zeros(), [torch.zeros((), device=device) for _ in ours])
    emas, plain_emas, exact_emas = (
        [p.detach().clone() for p in tensors] for tensors in (ours, plain, exact)
    )
    inv_scale = torch.tensor(0.125, device=device)
    for _ in range(40):
        grads = [torch.randn(s, generator=generator) for s in shapes]
        for p, q, g in zip(plain, exact, grads, strict=True):
            p.grad, q.grad = g.clone(), g.double()
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(plain, clip_norm)
            torch.nn.utils.clip_grad_norm_(exact, clip_norm)
        optimizer.step()
        wide.step()
        for averages, tensors in ((plain_emas, plain), (exact_emas, exact)):
            torch._foreach_lerp_(averages, [p.detach() for p in tensors], 0.1)
        adamw_ema(
            ours,
            [g.mul(8).to(device) for g in grads],
            *state,
            lr=1e-2,
            weight_decay=0.1,
            emas=emas,
            ema_decay=0.9,
            clip_norm=clip_norm,
            inv_scale=inv_scale,
        )
    got, own = ours + emas, plain + plain_emas
    for p, q, r in zip(got, own, exact + exact_emas, strict=True):
        error, torchs = ((t.detach().cpu().double() - r.detach()).abs().max() for t in (p, q))
        assert error <= 2 * torchs + ULP
    assert [s.item() for s in state[2]] == [40.0] * 3


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_equals_torch_fused(device, isa):
    """From the same state: bit for bit where torch does it, else to 1 ulp at the terms' scale."""
    torch.manual_seed(2)
    p, g = torch.randn(5000), torch.randn(5000)
    m, v = torch.randn(5000) * 0.1, torch.rand(5000)
    want = p.clone().requires_grad_()
    want.grad = g.clone()
    optimizer = torch.optim.AdamW([want], lr=3e-3, weight_decay=0.05, fused=True)
    state = {"step": torch.tensor(7.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimizer.state[want] = state
    optimizer.step()
    before = {"param": p, "exp_avg": m, "exp_avg_sq": v, "step": torch.tensor(7.0)}
    mine = [t.clone().to(device) for t in (p, g, m, v, torch.tensor(7.0))]
    adamw_ema(*([t] for t in mine), lr=3e-3, weight_decay=0.05)
    got = dict(zip(("param", "grad", "exp_avg", "exp_avg_sq", "step"), mine, strict=True))
    want = {"param": want.detach(), **state}
    for name, wanted in want.items():
        difference = (got[name].cpu() - wanted).abs()
        if isa == "" and device == "cpu":
            assert not difference.any(), name
        else:
            scale = torch.maximum(wanted.abs(), before[name].abs())
            assert (difference <= ULP * scale).all(), name
    assert torch.equal(mine[1].cpu(), g)  # gradients are only read


@pytest.mark.parametrize("isa", ["lanes1", "lanes32", "lanes256"])
@pytest.mark.parametrize(
    "settings",
    [{}, ALL, ALL | {"radius": None, "clip_norm": None, "skip_nonfinite": True}],
    ids=["plain", "all", "no ball"],
)
def test_the_shared_body_in_small_chunks_against_fp64(isa, settings):
    """Tails, several groups, no gradients, odd addresses; errors as the fp32 reference's own."""
    options = tables.Options(**settings)
    slots = random_slots(copies=options.ema_decay is not None, ball=options.radius is not None)
    scale = torch.tensor(0.5)
    results = []
    for kind in ("fp64", "fp32", "native"):
        groups = two_groups(copy.deepcopy(slots))
        if kind != "native":
            groups = flattened(groups, torch.float64 if kind == "fp64" else torch.float32)
        status = tables.new_status(torch.device("cpu"))
        for _ in range(5):
            if kind == "native":
                native_step(groups, options, status, scale, isa=isa)
            else:
                reference_step(groups, options, status, scale)
        results.append(([s for g in flattened(groups) for s in g.slots], status))
    wide, eager, native = results
    allowed = largest_differences(eager[0], wide[0])
    for name, error in largest_differences(native[0], wide[0]).items():
        ulp = 2**-7 if name == "shadow" else ULP
        assert error <= 2 * allowed[name] + 4 * ulp, name
    # The norm is of ratio 1e-6 to fp64's; factor, skip and ratio are what both must agree on.
    assert torch.allclose(native[1], wide[1], rtol=1e-6)


def test_sums_are_the_same_every_time():
    """Partial sums are added in one order, so repeated steps give the same bits."""
    first = None
    for _ in range(2):
        groups = two_groups(random_slots())
        status = tables.new_status(torch.device("cpu"))
        native_step(groups, tables.Options(**ALL), status)
        bits = [t.clone() for g in groups for s in g.slots for t in s[:8] if t is not None]
        first = first or (bits, status)
    assert all(torch.equal(a, b) for a, b in zip(first[0], bits, strict=True))
    assert torch.equal(first[1], status)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reason", ["flag", "inf", "nan"])
def test_a_step_that_is_not_finite_changes_nothing(device, reason, isa):
    slots = random_slots()
    if reason != "flag":
        slots[1].grad[134] = math.inf if reason == "inf" else math.nan
    arguments = lists(slots, device)
    before = copy.deepcopy(arguments)
    extra = {"found_inf": torch.tensor(1.0, device=device)} if reason == "flag" else {}
    extra["skip_nonfinite"] = reason == "nan"
    extra["clip_norm"] = 1.0 if reason == "inf" else None
    settings = dict(ema_decay=0.9, radius=0.1, noise_std=0.1, lr=0.1)
    status = adamw_ema(**arguments, **settings, **extra)
    assert status.skipped.item() == 1
    for name, tensors in before.items():
        for a, b in zip(tensors, arguments[name], strict=True):
            assert a is None or torch.equal(a.cpu().nan_to_num(), b.cpu().nan_to_num()), name
    extra["found_inf"] = torch.tensor(0.0, device=device)
    arguments["grads"] = [g if g is None else g.nan_to_num(posinf=0.0) for g in arguments["grads"]]
    status = adamw_ema(**arguments, **settings, **extra)
    assert status.skipped.item() == 0 and arguments["steps"][1].item() == 1


@pytest.mark.parametrize("device", DEVICES)
def test_clipping_is_by_the_norm_of_all_gradients(device, isa):
    """The first moment after one step shows the gradient that AdamW saw."""
    slots = random_slots(copies=False, ball=False)
    grads = [s.grad for s in slots if s.grad is not None]
    norm = torch.cat([g.flatten().double() for g in grads]).norm().item()
    for clip_norm, factor in ((norm / 3, 1 / 3), (2 * norm, 1.0)):
        arguments = lists(copy.deepcopy(slots), device)
        status = adamw_ema(**arguments, lr=0.1, clip_norm=clip_norm)
        assert status.grad_norm.item() == pytest.approx(norm, rel=1e-6)
        for slot, m in zip(slots, arguments["exp_avgs"], strict=True):
            if slot.grad is not None:
                assert torch.allclose(m.cpu(), 0.1 * factor * slot.grad, rtol=2e-6, atol=0)
    status = adamw_ema(**lists(slots, device), lr=0.1)
    assert status.grad_norm.item() == 0  # nobody asked for it


@pytest.mark.parametrize("device", DEVICES)
def test_shadows_are_the_weights_rounded_to_bfloat16(device, isa):
    values = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -3.14159, 1e-40, 3.4e38, math.nan])
    slots = [
        tables.Slot(*(values.clone(), None, *torch.zeros(2, 7), torch.tensor(1.0)), shadow=s)
        for s in (torch.zeros(7, dtype=torch.bfloat16),)
    ]
    arguments = lists(slots, device)
    adamw_ema(**arguments, lr=0.1)
    want = values.bfloat16()
    assert torch.equal(
        arguments["shadows"][0].cpu().view(torch.int16)[:6], want.view(torch.int16)[:6]
    )
    assert arguments["shadows"][0][6].isnan()


@pytest.mark.parametrize("device", DEVICES)
def test_the_ball_holds_all_weights_together(device, isa):
    slots = random_slots(copies=False)
    distance = 0.0
    for slot in slots:
        slot.param.copy_(slot.reference + 1e-3 * slot.param)
    for radius in (0.02, 10.0):
        arguments = lists(copy.deepcopy(slots), device)
        for _ in range(3):
            status = adamw_ema(**arguments, lr=1e-2, radius=radius)
            pairs = zip(arguments["params"], arguments["references"], strict=True)
            parts = [(p.double() - r.double()).norm().square() for p, r in pairs]
            distance = torch.stack(parts).sum().sqrt().item()
            assert distance <= radius * (1 + 1e-6)
        if radius < 1:
            assert distance == pytest.approx(radius, rel=1e-4)  # it was outside, now on the rim
            assert status.distance.item() > radius
        else:
            assert status.distance.item() == pytest.approx(distance, rel=1e-5)  # left alone


@pytest.mark.parametrize("device", DEVICES)
def test_noise_is_normal_repeatable_and_in_the_shadows_alone(device, isa):
    n = 40_000
    zeros = lambda: torch.zeros(n, device=device)  # noqa: E731

    def step(seed, count):
        slots = [zeros(), zeros(), zeros(), zeros(), torch.full((), count, device=device)]
        shadow = torch.zeros(n, dtype=torch.bfloat16, device=device)
        lists = [[t] for t in slots]
        adamw_ema(*lists, lr=0.1, shadows=[shadow], noise_std=0.5, seed=seed)
        assert not slots[0].any()  # the master weights are not touched
        return shadow.cpu().float()

    first = step(3, 0.0)
    assert torch.equal(first, step(3, 0.0))
    for other in (step(4, 0.0), step(3, 1.0), step(3 + (1 << 32), 0.0)):
        assert (first * other).mean().abs() < 4 * 0.25 / math.sqrt(n)
    # Standard errors: of the mean s / sqrt(n), of the deviation s / sqrt(2 n), of the share of
    # values beyond 2 s about 0.2 / sqrt(n); four of each. Rounding to bf16 adds 2^-9 of a value.
    assert first.mean().abs() < 4 * 0.5 / math.sqrt(n)
    assert abs(first.std().item() - 0.5) < 4 * 0.5 / math.sqrt(2 * n) + 1e-4
    assert abs((first.abs() > 1).float().mean().item() - 0.0455) < 4 * 0.21 / math.sqrt(n)
    want = 0.5 * reference.weight_noise(3, 0, 1, n, torch.device("cpu"))
    assert (first.double() - want).abs().max() <= 2**-8 * want.abs().max()


def test_weight_noise_is_the_known_stream_of_numbers(monkeypatch):
    """The same generator as the images' noise, on another stream."""
    monkeypatch.setattr(sys.modules["pybackdoor.reference.adamw_ema"], "STREAM_WEIGHTS", 1)
    got = reference.weight_noise(9, 5, 6, 12, torch.device("cpu"))
    want = noise_normals(9, 0, torch.tensor([5 | 6 << 32]), (3, 4))[0, 0].flatten()
    assert torch.equal(got.float(), want)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_in_another_order_of_memory(device, isa):
    """A gradient is brought into its parameter's order; an expanded one counts once an element."""
    torch.manual_seed(3)
    p = torch.randn(4, 3, 5, 5, device=device)
    expanded = torch.ones((), device=device).expand(4, 3, 5, 5)
    for grad in (torch.randn_like(p), expanded):
        results = []
        for order in (torch.contiguous_format, torch.channels_last):
            q = p.clone(memory_format=order)
            state = [[torch.zeros_like(q)], [torch.zeros_like(q)]]
            step = torch.zeros((), device=device)
            adamw_ema([q], [grad], *state, [step], lr=0.1, clip_norm=1.0)
            results.append(q)
        assert torch.allclose(*results, rtol=0, atol=2 * ULP)  # the norm's sum has another order


@pytest.mark.parametrize("device", DEVICES)
def test_lr_as_a_tensor(device, isa):
    results = []
    for lr in (0.25, torch.tensor(0.25), torch.tensor([0.25], device=device)):
        arguments = lists(random_slots(copies=False, ball=False), device)
        adamw_ema(**arguments, lr=lr, weight_decay=0.1)
        results.append(arguments["params"])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_the_registered_op(device):
    arguments = lists(random_slots(), device)
    hyper, lr = [0.1, 0.9, 0.999, 1e-8, 0.01], None
    flat = [*arguments.values(), lr, None, None, hyper, 1.0, False, 0.9, 0.5, 0.1, 7]
    torch.library.opcheck(OP_MODULE.adamw_ema_step, tuple(flat))

    def step(params, grads, m, v, t):
        return adamw_ema(params, grads, m, v, t, lr=0.1, clip_norm=1.0).grad_norm

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        tensors = lists(random_slots(copies=False, ball=False, without_grad=()), device)
        norm = run(*tensors.values())
        results.append([norm, *tensors["params"]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nothing_to_do():
    status = adamw_ema([], [], [], [], [], lr=0.1)
    assert [x.item() for x in status] == [0, 0, 0]


def test_the_chunks_cover_large_tensors():
    """Positions beyond 2^31 are kept in 64 bits."""
    chunks = tables.chunk_table([5, 0, (1 << 33) + 1, 8192], 1 << 20)
    assert chunks.dtype == torch.int64 and len(chunks) == 1 + 0 + 8193 + 1
    assert chunks[0].tolist() == [0, 0] and chunks[-1].tolist() == [3, 0]
    assert chunks[-2].tolist() == [2, 1 << 33] and chunks[1].tolist() == [2, 0]
