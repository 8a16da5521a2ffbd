"""contrastive_par against autograd through the target-separated softplus formulas in fp64."""

import math
import sys
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from contrastive_par_features import random_case
from hypothesis import given, settings
from hypothesis import strategies as st

import pybackdoor
from pybackdoor import reference
from pybackdoor.ops import _contrastive_par_cpu, contrastive_par
from pybackdoor.ops import _contrastive_par_driver as driver
from pybackdoor.ops._contrastive_par_check import owners, segments, weights

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OP = sys.modules["pybackdoor.ops.contrastive_par"]


def oracle(case, scale, *, tau=2.15, distance_weight=0.5, normalize=True, dtype=torch.float64):
    """Statistics and gradients (text, image, scale) of the reference in `dtype`."""
    text, image = (case[k].detach().to(dtype).requires_grad_() for k in ("text", "image"))
    s = torch.tensor(scale, dtype=dtype, requires_grad=True)
    refs = [None if case.get(k) is None else case[k].to(dtype) for k in ("text_ref", "image_ref")]
    plain = case.get("owner") is None and case.get("weight") is None
    owner, order = owners(case.get("owner"), text, image)
    assert order is None
    options = [case.get(k) for k in ("weight", "column_weight", "valid", "suspect")]
    made = weights(*options, owner, len(image), len(image), dtype, plain)
    stats = reference.contrastive_par(
        text, image, s, owner, segments(owner, len(image)), *made, *refs, normalize, [],
        distance_weight, tau,
    )  # fmt: skip
    stats[0].backward()
    return stats.detach(), (text.grad, image.grad, s.grad)


def ours(case, scale, device="cpu", **options):
    """Statistics and gradients of the op."""
    moved = {k: v.to(device) for k, v in case.items()}
    text, image = (moved.pop(k).detach().requires_grad_() for k in ("text", "image"))
    s = torch.tensor(scale, dtype=text.dtype, device=device, requires_grad=True)
    result = contrastive_par(text, image, s, **moved, **options)
    result.loss.backward()
    return torch.stack(result).detach().cpu(), [x.grad.cpu() for x in (text, image, s)]


def errors(got, want):
    """Normwise relative errors of the loss and the three gradients.

    The loss is a difference: its error is taken relative to the larger of it and its first part.
    """
    size = want[0][:2].abs().max().clamp_min(1e-300)
    found = [((got[0][0].double() - want[0][0]).abs() / size).item()]
    for a, b in zip(got[1], want[1], strict=True):
        found.append(((a.double() - b).norm() / b.norm().clamp_min(1e-300)).item())
    return found


# 2 and 3: hardly a negative; 129 and 1000: tails of every tile; 512, 2048: whole tiles, the latter
# in two blocks of rows, which know nothing of D. 640 and 1024: widths of ConvNeXt and RN50; 64: a
# single step over D.
@pytest.mark.parametrize(
    "n, d", [*product([2, 3, 129, 512, 1000], [64, 512, 640, 1024]), (2048, 512)]
)
@pytest.mark.parametrize("device", DEVICES)
def test_loss_and_gradients_equal_fp64_autograd(n, d, device):
    case = random_case(n + n // 2, n, d, seed=n + d) if n < 2048 else random_case(n, n, d, seed=d)
    for scale, tolerance in ((20.0, 1e-6), (100.0, 1e-5)):
        wanted = oracle(case, scale)
        got = ours(case, scale, device)
        assert max(errors(got, wanted)) <= tolerance
        assert (got[0] - wanted[0]).abs().max() <= tolerance * 10


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_at_most_twice_as_much_as_eager(dtype, device):
    for n, d, scale in ((129, 512, 20.0), (512, 64, 100.0)):
        case = random_case(n, n, d, dtype=dtype, signs=False)
        wanted = oracle(case, scale)
        eager = errors(oracle(case, scale, dtype=dtype), wanted)
        got = errors(ours(case, scale, device), wanted)
        ulp = torch.finfo(dtype).eps
        assert all(g <= 2 * e + ulp for g, e in zip(got, eager, strict=True)), (got, eager)


@pytest.mark.parametrize("device", DEVICES)
def test_plain_case_is_clip_loss(device):
    dtype = torch.float64 if device == "cpu" else torch.float32
    case = random_case(70, 70, 48, signs=False, refs=False, dtype=dtype)
    text, image = (case[k].to(device).requires_grad_() for k in ("text", "image"))
    s = torch.tensor(14.3, dtype=dtype, device=device, requires_grad=True)
    bias = torch.tensor(-3.0, dtype=dtype, device=device, requires_grad=True)
    ours = pybackdoor.ContrastiveLoss()

    def units():
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1)

    def gradients(loss):
        return torch.autograd.grad(loss, (text, image, s))

    open_clip = pytest.importorskip("open_clip")  # the only test here that needs it
    wanted = open_clip.ClipLoss()(*units(), s)
    for loss in (
        contrastive_par(text, image, s).loss,
        contrastive_par(*reversed(units()), s, normalize=False).loss,
        ours(*units(), s),
        ours(*units(), s, bias),
        ours(*units(), logit_scale=s, output_dict=True)["contrastive_loss"],
    ):
        torch.testing.assert_close(loss, wanted)
        for a, b in zip(gradients(loss), gradients(open_clip.ClipLoss()(*units(), s)), strict=True):
            torch.testing.assert_close(a, b)
    assert torch.autograd.grad(ours(*units(), s, bias), bias)[0] == 0


def test_features_as_given_are_not_normalised():
    case = random_case(30, 30, 16, signs=False, refs=False, dtype=torch.float64)
    for spread in (0.3, 3.0):  # beyond 1 the sums overflow and are formed again
        scaled = {k: v * spread for k, v in case.items()}
        wanted = oracle(scaled, 60.0, normalize=False)
        assert max(errors(ours(scaled, 60.0, normalize=False), wanted)) <= 1e-9
        single = {k: v.float() for k, v in scaled.items()}
        assert max(errors(ours(single, 60.0, normalize=False), wanted)) <= 1e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("best", [-0.9, -0.62, -0.45, -0.2, 0.0, 0.4, 0.9, 1.0])
def test_any_best_cosine_is_accurate_at_scale_100(best, device):
    """Rows whose best cosine is low underflow a shift of s: nothing is NaN here."""
    g = torch.Generator().manual_seed(0)
    axis = F.normalize(torch.randn(1, 256, generator=g).double(), dim=-1)
    text = F.normalize(axis + 0.02 * torch.randn(64, 256, generator=g).double(), dim=-1)
    spread = F.normalize(torch.randn(64, 256, generator=g).double(), dim=-1)
    spread = F.normalize(spread - (spread * axis).sum(1, keepdim=True) * axis, dim=-1)
    image = best * axis + math.sqrt(1 - best**2) * spread
    case = {"text": text.float(), "image": image.float()}
    wanted = oracle(case, 100.0)
    got = ours(case, 100.0, device)
    assert all(x.isfinite().all() for x in (got[0], *got[1]))
    *found, of_scale = errors(got, wanted)
    assert of_scale <= 1e-3  # a difference of nearly equal sums where all texts are alike
    if best < 1:  # else all images are equal, and the gradients of the rows differences of rounding
        assert max(found) <= 1e-5
    assert found[0] <= 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_scales_beyond_100(device):
    case = random_case(90, 60, 64)
    for scale in (150.0, 400.0):
        wanted = oracle(case, scale)
        assert max(errors(ours(case, scale, device), wanted)) <= 1e-6 * scale


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(0, 40), n=st.integers(1, 24), d=st.integers(4, 70), seed=st.integers(0, 99),
    scale=st.floats(0.5, 120), tau=st.sampled_from([0.0511, 0.913, 2.15, math.inf]),
    weight=st.sampled_from([0.5, -1.0]), strided=st.booleans(), budget=st.sampled_from([None, 0]),
    normalize=st.booleans(),
)  # fmt: skip
def test_any_shape_and_strides(m, n, d, seed, scale, tau, weight, strided, budget, normalize):
    case = random_case(m, n, d, seed=seed)
    options = {"tau": tau, "distance_weight": weight, "normalize": normalize}
    wanted = oracle(case, scale, **options)
    moved = dict(case)
    for name in ("text", "image"):
        x = moved.pop(name)
        if strided:
            x = torch.stack((x, x), dim=2).transpose(0, 1).contiguous().transpose(0, 1)[..., 1]
        moved[name] = x
    got = ours(moved, scale, budget=budget, **options)
    for a, b in zip((got[0], *got[1]), (wanted[0], *wanted[1]), strict=True):
        largest = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-4 * largest + 1e-7 * scale)


def test_e_kept_and_formed_again_agree(monkeypatch):
    case = random_case(300, 200, 64)
    kept = ours(case, 30.0)
    again = ours(case, 30.0, budget=0)
    assert all(torch.equal(a, b) for a, b in zip(kept[1], again[1], strict=True))
    assert torch.equal(kept[0], again[0])
    monkeypatch.setattr(driver, "empty", _no_memory)
    starved = ours(case, 30.0)
    assert all(torch.equal(a, b) for a, b in zip(kept[1], starved[1], strict=True))


def test_compiled_code_gets_the_sizes_it_was_promised_or_an_error(monkeypatch):
    case = random_case(30, 30, 16, signs=False, refs=False)
    step = torch.compile(
        lambda x, y: contrastive_par(x, y, torch.tensor(9.0)).loss, backend="aot_eager"
    )
    monkeypatch.setattr(driver, "empty", _no_memory)
    with pytest.raises(RuntimeError, match="allocate memory|budget"):
        step(case["text"].requires_grad_(), case["image"])


def test_inference_mode_before_training():
    case = random_case(21, 21, 16, signs=False, refs=False)
    with torch.inference_mode():
        contrastive_par(*case.values(), torch.tensor(9.0))
    ours(case, 9.0)


@pytest.mark.parametrize("onednn", [True, False])
def test_autocast_changes_nothing(onednn, monkeypatch):
    from pybackdoor.ops import _matmul

    if not onednn:
        monkeypatch.setattr(_matmul, "_onednn", lambda: None)
    case = random_case(40, 30, 32)
    wanted = ours(case, 20.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ours(case, 20.0)
    for a, b in zip((got[0], *got[1]), (wanted[0], *wanted[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def _no_memory(*_):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


def test_no_memory_for_the_blocks_is_a_plain_error(monkeypatch):
    from pybackdoor.ops import _contrastive_par_cpu as matrices

    monkeypatch.setattr(matrices, "matmul_nt", _no_memory)
    with pytest.raises(torch.OutOfMemoryError, match="contrastive_par: .* 200 x 300 .*block"):
        ours(random_case(200, 300, 64), 30.0)


def test_frozen_towers_and_scale():
    case = random_case(50, 40, 32)
    wanted = oracle(case, 20.0)
    for needs in [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]:
        leaves = [case["text"].clone(), case["image"].clone(), torch.tensor(20.0)]
        for x, need in zip(leaves, needs, strict=True):
            x.requires_grad_(bool(need))
        rest = {k: v for k, v in case.items() if k not in ("text", "image")}
        loss = contrastive_par(*leaves, **rest).loss
        assert loss.requires_grad == any(needs)
        if any(needs):
            loss.backward()
        for x, need, want in zip(leaves, needs, wanted[1], strict=True):
            assert (x.grad is not None) == bool(need)
            if need:
                assert (x.grad - want).norm() <= 1e-6 * want.norm()


def test_without_gradient_nothing_is_kept(monkeypatch):
    asked = []
    monkeypatch.setattr(driver, "_allocate_e", lambda *a: asked.append(a))
    case = random_case(40, 40, 32, signs=False, refs=False)
    with torch.no_grad():
        contrastive_par(*case.values(), torch.tensor(9.0))
    contrastive_par(*case.values(), torch.tensor(9.0))
    assert not asked
    contrastive_par(case["text"].requires_grad_(), case["image"], torch.tensor(9.0))
    assert asked


def small(dtype=torch.float64):
    case = random_case(7, 5, 3, dtype=dtype)
    leaves = [case.pop(k).requires_grad_() for k in ("text", "image")]
    return [*leaves, torch.tensor(6.0, dtype=dtype, requires_grad=True)], case


def test_gradcheck():
    leaves, case = small()
    case["tau"] = math.inf  # a gate's edge has no derivative
    torch.autograd.gradcheck(lambda *x: contrastive_par(*x, **case).loss, leaves)
    case |= {"distance_weight": -1.0, "normalize": False}
    torch.autograd.gradcheck(lambda *x: contrastive_par(*x, **case).loss, leaves)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    leaves, case = small(torch.float32)
    owner = case["owner"].to(torch.int32)
    made = weights(case["weight"], None, None, None, owner, 5, 5, torch.float32, False)
    tensors = [*leaves, owner, segments(owner, 5), *made, case["text_ref"], case["image_ref"]]
    tensors = [x.detach().to(device).requires_grad_(x.requires_grad) for x in tensors]
    for budget in (-1, 0):
        arguments = (*tensors, True, [], [0.5, 2.15], "ieee", budget, False)
        torch.library.opcheck(torch.ops.pybackdoor.contrastive_par_fwd.default, arguments)
        saved = [x.detach() for x in OP.contrastive_par_fwd(*arguments)]
        plain = [x.detach() for x in tensors]
        torch.library.opcheck(
            torch.ops.pybackdoor.contrastive_par_bwd.default,
            (torch.ones(6, device=device), *plain, *arguments[10:14], saved, [True] * 3),
        )


@pytest.mark.parametrize("signs", [False, True])
def test_compiles_whole(signs):
    case = random_case(9, 9, 8, signs=signs)
    wanted = ours(case, 10.0)
    text, image = (case.pop(k).requires_grad_() for k in ("text", "image"))
    s = torch.tensor(10.0, requires_grad=True)
    step = torch.compile(
        lambda *x: contrastive_par(*x, **case).loss, fullgraph=True, backend="aot_eager"
    )
    step(text, image, s).backward()
    for x, want in zip((text, image, s), wanted[1], strict=True):
        torch.testing.assert_close(x.grad, want)


def test_no_second_derivative():
    leaves, case = small()
    (grad,) = torch.autograd.grad(
        contrastive_par(*leaves, **case).loss, leaves[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_thread_count_changes_no_bit(monkeypatch):
    case, before = random_case(700, 600, 64), torch.get_num_threads()
    found = []

    def on_one_thread(a, b):
        """The libraries' own are not all the same bits with more threads."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return a @ b.T
        finally:
            torch.set_num_threads(threads)

    monkeypatch.setattr(_contrastive_par_cpu, "matmul_nt", on_one_thread)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(ours(case, 50.0))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(found[0][0], other[0])
        assert all(torch.equal(a, b) for a, b in zip(found[0][1], other[1], strict=True))


def test_unsorted_owners_are_sorted():
    case = random_case(40, 20, 16)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    wanted = ours(case, 12.0)
    shuffled = case | {k: case[k][order] for k in ("text", "text_ref", "owner", "weight")}
    got = ours(shuffled, 12.0)
    torch.testing.assert_close(got[0], wanted[0])
    torch.testing.assert_close(got[1][0], wanted[1][0][order])
    torch.testing.assert_close(got[1][1], wanted[1][1])


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (1, 1), (4, 1)])
def test_no_negatives_no_loss(shape):
    m, n = shape
    case = {"text": torch.randn(m, 8), "image": torch.randn(n, 8)}
    if m != n:
        case["owner"] = torch.zeros(m, dtype=torch.int64)
        case["weight"] = torch.ones(m)
        case["column_weight"] = torch.ones(n)
    stats, grads = ours(case, 20.0)
    assert (stats[:4] == 0).all() and all((g == 0).all() for g in grads)


def test_rows_that_take_no_part():
    """All rows skipped, all images invalid: 0. Skipped rows are nobody's negatives."""
    case = random_case(30, 20, 16)
    for change in ({"weight": torch.zeros(30)}, {"valid": torch.zeros(20, dtype=torch.bool)}):
        stats, grads = ours({**case, **change}, 20.0, tau=0.0)
        assert stats[1] == 0 and all((g == 0).all() for g in grads)
    case["weight"][5:] = 0
    fewer = case | {k: case[k][:5] for k in ("text", "text_ref", "owner", "weight")}
    for name in ("text_ref", "image_ref"):  # their mean counts the skipped rows
        del case[name], fewer[name]
    torch.testing.assert_close(ours(case, 20.0)[0], ours(fewer, 20.0)[0])


def test_zero_rows_have_the_gradient_of_normalize():
    case = random_case(12, 12, 16, signs=False, refs=False)
    case["text"][3] = 0
    wanted, got = oracle(case, 20.0), ours(case, 20.0)
    assert abs(got[0][0] - wanted[0][0]) < 1e-6
    for a, b in zip(got[1], wanted[1], strict=True):
        assert (a.double() - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["text", "image", "text_ref", "image_ref"])
def test_nan_features_are_not_masked(name, device):
    case = random_case(60, 40, 32)
    case["valid"][:] = True
    case["weight"] = case["weight"].abs() + 0.01
    case[name][7, 3] = math.nan
    stats, grads = ours(case, 20.0, device)
    assert stats[0].isnan()
    assert any(not g.isfinite().all() for g in grads)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])
def test_more_pairs_than_32_bits_count(device):
    """Eight different rows, repeated: the sums are known without a matrix."""
    g = torch.Generator().manual_seed(0)
    few = F.normalize(torch.randn(8, 64, generator=g).double(), dim=-1)
    n = 47_104
    x = few[torch.arange(n) % 8].float().to(device).requires_grad_()
    loss = contrastive_par(x, x.detach().clone(), torch.tensor(10.0), budget=0).loss
    cosines = (10 * few @ few.T).exp()
    total = cosines.sum(1) * (n / 8)
    wanted = (total.log() - 10).mean()
    assert abs(loss.item() - wanted.item()) < 1e-5 * wanted.item()
    loss.backward()
    assert x.grad.isfinite().all()


TOO_FAR = torch.tensor([0, 1, 2, 4])
BAD = {
    "text must be a tensor": (TypeError, {"text": [1.0]}),
    "text must be \\[rows, D\\]": (ValueError, {"text": torch.zeros(4)}),
    "text must be one of": (TypeError, {"text": torch.zeros(4, 8, dtype=torch.int32)}),
    "image must be \\[N, 8\\] like text": (ValueError, {"image": torch.zeros(4, 9)}),
    "image must be torch.float32 like text": (TypeError, {"image": torch.zeros(4, 8).double()}),
    "image must be on cpu like text": (ValueError, {"image": torch.zeros(4, 8, device="meta")}),
    "scale must be one floating": (ValueError, {"scale": torch.ones(2)}),
    "text_ref must be \\[4, 8\\]": (ValueError, {"text_ref": torch.zeros(3, 8)}),
    "image_ref must be .* torch.float32": (ValueError, {"image_ref": torch.zeros(4, 8).double()}),
    "without owner every image": (ValueError, {"image": torch.zeros(5, 8)}),
    "owner must be \\[4\\] int32 or int64": (ValueError, {"owner": torch.zeros(4)}),
    "owner must be in \\[0, 4\\), .* got 0 to 4": (ValueError, {"owner": TOO_FAR}),
    "owner must be in .* got -1": (ValueError, {"owner": torch.tensor([-1, 1, 2, 3])}),
    "weight must be \\[4\\], got": (ValueError, {"weight": torch.ones(3)}),
    "weight must be floating": (TypeError, {"weight": torch.ones(4, dtype=torch.int64)}),
    "weight must be finite, got nan": (ValueError, {"weight": torch.tensor([1, math.nan, 1, 1])}),
    "column_weight must be finite": (ValueError, {"column_weight": torch.full((4,), math.inf)}),
    "column_weight must be at least 0": (ValueError, {"column_weight": -torch.ones(4)}),
    "valid must be bool": (TypeError, {"valid": torch.ones(4)}),
    "suspect must be \\[4\\]": (ValueError, {"suspect": torch.ones(5, dtype=torch.bool)}),
    "distance_weight must be finite": (ValueError, {"distance_weight": math.nan}),
    "distance_weight must be a number, got 'a'": (TypeError, {"distance_weight": "a"}),
    "tau must be a number, got None": (TypeError, {"tau": None}),
    "tau must be at least 0": (ValueError, {"tau": -1.0}),
    "precision must be one of": (ValueError, {"precision": "fp8"}),
    "budget must be a number": (ValueError, {"budget": -1}),
    "budget must be an integer": (TypeError, {"budget": 1e9}),
    "text rows need images": (ValueError, {"image": torch.zeros(0, 8)}),
    "counts must hold": (ValueError, {"counts": [4, 4]}),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    error, change = BAD[message]
    case = {"text": torch.ones(4, 8), "image": torch.ones(4, 8), "scale": torch.tensor(1.0)}
    case |= change
    with pytest.raises(error, match="contrastive_par: .*" + message):
        contrastive_par(case.pop("text"), case.pop("image"), case.pop("scale"), **case)
