"""The gradients of trigger_normalize against fp64 autograd through the chain a user writes."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trigger_normalize_cases import (
    DEVICES,
    DTYPES,
    GRADIENT_MODULE,
    ISAS,
    MEAN,
    OP_MODULE,
    STD,
    isa,  # noqa: F401
    ran,  # noqa: F401
    random_images,
)

from pybackdoor import reference
from pybackdoor._native import _C
from pybackdoor.ops import Augment, TriggerTable, trigger_normalize
from pybackdoor.ops._trigger_normalize_gradient import num_slices, sample_order

NORM = {"mean": MEAN, "std": STD}
KINDS = ["patch", "patch_clip", "blend", "clip", "additive", "nonzero"]
KINDS += ["mask1", "mask3", "mask1_clip", "mask3_additive_clip", "mask1_nonzero"]
# fp32 rounds each term and sum once or twice: a few units of 6e-8 on sums of up to 64 terms,
# relative to the largest gradient.
TOLERANCE = 2e-6
# 1x1 and 3x31: less than the 4 pixels of a thread, odd rows; 17x33: rows that straddle them;
# 16x16: whole ones; 40x48: two tiles of 1024 pixels.
SIZES = [(1, 1), (3, 31), (17, 33), (16, 16), (40, 48)]


def make_table(kind, triggers, h, w, seed=0):
    """Triggers whose tensors require grad; values outside [0, 1], so that the clip takes part."""
    g = torch.Generator().manual_seed(seed)
    pattern = torch.rand(triggers, 3, h, w, generator=g) * 1.6 - 0.3
    if "nonzero" in kind:
        pattern *= torch.rand(triggers, 3, h, w, generator=g) > 0.3
    mask = None
    if kind.startswith("mask"):
        mask = torch.rand(triggers, int(kind[4]), h, w, generator=g).requires_grad_()
    return TriggerTable(
        "patch" if kind.startswith("patch") else "blend",
        pattern=pattern.requires_grad_(),
        mask=mask,
        nonzero_only="nonzero" in kind,
        additive="additive" in kind,
        clip="clip" in kind,
    )


def make_case(kind, batch, height, width, whole=False, triggers=2, seed=0):
    """The op's keywords: ids with -1, positions, strengths."""
    h, w = (height, width) if whole else (max(1, height // 2), max(1, width * 2 // 3))
    g = torch.Generator().manual_seed(seed + 1)
    y = torch.randint(0, height - h + 1, (batch,), generator=g)
    x = torch.randint(0, width - w + 1, (batch,), generator=g)
    return {
        "triggers": make_table(kind, triggers, h, w, seed),
        "trigger_id": torch.randint(-1, triggers, (batch,), generator=g),
        "position": torch.stack((y, x), dim=1),
        "strength": torch.rand(batch, dtype=torch.float64, generator=g),
    }


def user_chain(images, case, pattern, mask, squares=None):
    """[B, 3, H, W] fp64 from [B, H, W, 3] uint8, image by image, with slices and torch.where."""
    table, out = case["triggers"], []
    mean, std = (torch.tensor(v, dtype=torch.float32).double().view(3, 1, 1) for v in (MEAN, STD))
    for i, image in enumerate(images):
        x = image.permute(2, 0, 1).double() / 255
        k = int(case["trigger_id"][i]) if "trigger_id" in case else 0
        if k >= 0:
            t, (h, w) = pattern[k], pattern.shape[2:]
            y0, x0 = case["position"][i].tolist() if "position" in case else (0, 0)
            rows = slice(max(y0, 0), max(0, min(y0 + h, x.shape[1])))
            cols = slice(max(x0, 0), max(0, min(x0 + w, x.shape[2])))
            part = (
                slice(None),
                slice(rows.start - y0, rows.stop - y0),
                slice(cols.start - x0, cols.stop - x0),
            )
            if rows.start < rows.stop and cols.start < cols.stop:
                under, t = x[:, rows, cols], t[part]
                if table.mode == "patch":
                    v = t
                else:
                    s = case["strength"][i] if "strength" in case else 1.0
                    a = s if mask is None else s * mask[k][part]
                    v = a * t + under if table.additive else a * t + (1 - a) * under
                    if table.nonzero_only:
                        v = torch.where(t != 0, v, under)
                v = v.clamp(0, 1) if table.clip else v
                x = x.clone()
                x[:, rows, cols] = v
        y = (x - mean) / std
        if squares is not None:
            keep = torch.ones_like(y)
            y0, x0, side = squares[i].tolist()
            keep[:, y0 : y0 + side, x0 : x0 + side] = 0
            y = y * keep
        out.append(y)
    touched = pattern.sum() if mask is None else pattern.sum() + mask.sum()
    return torch.stack(out) + 0 * touched  # so that autograd knows of them all


def patchify(x, p):
    """[B, 3, H, W] to [B, P, 3 * p * p]."""
    b, _, h, w = x.shape
    x = x.reshape(b, 3, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, -1, 3 * p * p)


def relative(got, want):
    """Largest error relative to the largest value."""
    return ((got.double().cpu() - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()


def wanted(images, case, p=None, dtype=torch.float32, squares=None):
    """In fp64: the output, a gradient of it in that dtype, and the leaves' gradients."""
    table = case["triggers"]
    doubles = [
        t.detach().double().requires_grad_() for t in (table.pattern, table.mask) if t is not None
    ]
    want = user_chain(images, case, *(doubles if len(doubles) == 2 else (*doubles, None)), squares)
    want = want if p is None else patchify(want, p)
    g = torch.Generator().manual_seed(9)
    upstream = torch.randn(want.shape, generator=g).to(dtype)
    return want.detach(), upstream, torch.autograd.grad(want, doubles, upstream.double())


@functools.lru_cache(maxsize=30)  # of a test's settings, for the next instruction set
def made(kind, height, width, whole, p, dtype):
    """Images, a case, and what is wanted of them."""
    images, case = random_images(7, height, width), make_case(kind, 7, height, width, whole)
    return images, case, wanted(images, case, p, dtype)


def check_gradients(images, case, device="cpu", p=None, augment=None, want=None, **options):
    """Output and gradients of the op against fp64; returns the gradients. images: NHWC, on CPU."""
    table = case["triggers"]
    leaves = [t for t in (table.pattern, table.mask) if t is not None]
    squares = None
    if augment is not None:
        ids = torch.arange(len(images)) * 3
        options |= {"augment": augment, "sample_id": ids, "seed": 7, "view": 2}
        size = images.shape[1:3]
        squares = reference.augment_decisions(augment, 7, 2, ids, size)[1]
        assert (squares[:, 2] > 0).any()
    dtype = options.get("dtype", torch.float32)
    want, upstream, want_grads = want or wanted(images, case, p, dtype, squares)

    placed = [t.detach().to(device).requires_grad_() for t in leaves]
    moved = {k: v.to(device) for k, v in case.items() if k != "triggers"}
    moved["triggers"] = TriggerTable(
        **vars(table) | dict(zip(("pattern", "mask"), placed, strict=False))
    )
    x = images.permute(0, 3, 1, 2) if options.get("input_layout") == "nchw" else images
    x = x.contiguous().to(device)
    options |= {"layout": options.get("layout", "nchw" if p is None else "patchified")}
    options |= {"patch_size": p}
    results = []
    for quantize in (False, True):
        got = trigger_normalize(x, **moved, **NORM, **options, quantize=quantize)
        results.append(torch.autograd.grad(got, placed, upstream.to(device)))
        if not quantize:
            # One rounding to the dtype, at the scale of the output.
            rounding = TOLERANCE + {torch.float32: 0, torch.float16: 5e-4}.get(dtype, 4e-3)
            assert got.dtype == dtype and relative(got, want) <= rounding
    for a, b, w in zip(*results, want_grads, strict=True):
        assert a.dtype == torch.float32 and a.is_contiguous() and a.device.type == device
        assert torch.equal(a, b)  # straight through the quantisation
        assert relative(a, w) <= TOLERANCE
    return results[0]


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_layout(kind, whole, device, isa, ran):  # noqa: F811
    for height, width in SIZES:
        p = 8 if height % 8 == 0 and width % 8 == 0 else 1
        layouts = [{}, {"layout": "channels_last"}, {"p": p}]
        for k, (layout, input_layout) in enumerate(itertools.product(layouts, ("nhwc", "nchw"))):
            # Each dtype meets each layout at some size, kind and window.
            dtype = DTYPES[(k + height + KINDS.index(kind)) % 3]
            images, case, want = made(kind, height, width, whole, layout.get("p"), dtype)
            options = {"input_layout": input_layout, "dtype": dtype, **layout}
            check_gradients(images, case, device, want=want, **options)
    names = {isa, isa} if device == "cpu" else {"cuda"}
    assert set(ran) == names and len(ran) == len(SIZES) * 6 * 4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_erased_squares_have_no_gradient(dtype, device, isa):  # noqa: F811
    augment = Augment(noise_p=0, erase_p=0.7, erase_area=(0.05, 0.3))
    for whole, p in ((True, None), (False, None), (True, 6)):
        images = random_images(9, 18, 24)
        case = make_case("mask1", 9, 18, 24, whole)
        check_gradients(images, case, device, p=p, augment=augment, dtype=dtype)
        check_gradients(images, case, device, augment=augment, dtype=dtype, layout="channels_last")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["patch", "mask3_additive_clip"])
def test_a_window_is_cropped_at_the_edge(kind, device, isa, monkeypatch):  # noqa: F811
    """Positions that only a CUDA tensor can hold, as they are not looked at there."""
    for module in (OP_MODULE, GRADIENT_MODULE):
        monkeypatch.setattr(module, "check_values", lambda *_: None)
    far = 1 << 20
    for width in (19, 20):
        places = [-far, -13, -12, -4, -1, 0, 3, 9, 16, 17, far]
        position = torch.tensor(list(itertools.product(places, repeat=2)))
        images = random_images(len(position), 17, width)
        case = make_case(kind, len(position), 17, width, triggers=1)
        case |= {"position": position}
        check_gradients(images, case, device)


@pytest.mark.parametrize("device", DEVICES)
def test_one_trigger_per_image_and_one_for_all(device, isa):  # noqa: F811
    images = random_images(40, 9, 12)
    case = make_case("mask1", 40, 9, 12, triggers=40)
    for ids in (torch.arange(40).flip(0), torch.zeros(40).long(), torch.full((40,), -1)):
        check_gradients(images, case | {"trigger_id": ids}, device)
    del case["trigger_id"]
    check_gradients(images, case, device)  # all the first of 40
    single = make_case("mask1", 40, 9, 12, triggers=1)
    del single["trigger_id"], single["position"], single["strength"]
    check_gradients(images, single, device)


def test_all_kernels_and_thread_counts_give_the_same_bits(monkeypatch):
    """Ten slices, several tiles, a clip: every instruction set, the warp's order, 1-3 threads."""
    images = random_images(33, 48, 56)
    for kind, whole in (("mask1_clip", True), ("mask3", False), ("blend", True)):
        case = make_case(kind, 33, 48, 56, whole)
        table = case["triggers"]
        leaves = [t for t in (table.pattern, table.mask) if t is not None]
        results = []

        def run(leaves=leaves, case=case, results=results):
            out = trigger_normalize(images, **case, **NORM, dtype=torch.bfloat16, quantize=False)
            weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
            results.append([out, *torch.autograd.grad((out * weights).sum(), leaves)])

        for name in (*_C.isas(), "lanes1", "lanes32"):
            monkeypatch.setenv("PYBACKDOOR_CPU_ISA", name)
            run()
        monkeypatch.delenv("PYBACKDOOR_CPU_ISA")
        before = torch.get_num_threads()
        try:
            for threads in (2, 3):
                torch.set_num_threads(threads)
                run()
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_reference_agrees(monkeypatch):
    images = random_images(8, 10, 12)
    augment = Augment(noise_p=0, erase_p=0.7, erase_area=(0.05, 0.3))
    monkeypatch.setenv("PYBACKDOOR_BACKEND", "reference")
    for kind in KINDS:
        case = make_case(kind, 8, 10, 12)
        for options in ({}, {"p": 2}, {"layout": "channels_last", "augment": augment}):
            check_gradients(images, case, **options)
            check_gradients(images, case, input_layout="nchw", dtype=torch.float16, **options)


def test_gradcheck_of_the_reference_in_fp64():
    images = random_images(3, 4, 5)
    for kind in ("mask1", "mask3_additive_clip", "mask1_nonzero", "patch", "clip"):
        case = make_case(kind, 3, 4, 5)
        table = case.pop("triggers")
        leaves = [t for t in (table.pattern, table.mask) if t is not None]
        doubles = [t.detach().double().requires_grad_() for t in leaves]

        def run(*leaves, case=case, table=table):
            members = dict(zip(("pattern", "mask"), leaves, strict=False))
            moved = object.__new__(TriggerTable)
            moved.__dict__.update(vars(table) | members)
            options = {"quantize": False, "dtype": torch.float64}
            return reference.trigger_normalize(images, triggers=moved, **case, **NORM, **options)

        # Zeros of a nonzero_only pattern are no place to take a difference at.
        if kind == "mask1_nonzero":
            pattern, mask = doubles
            assert torch.autograd.gradcheck(lambda m, p=pattern, r=run: r(p.detach(), m), mask)
        else:
            assert torch.autograd.gradcheck(run, doubles, eps=1e-7, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_and_stride(data):
    batch, height, width = (data.draw(st.integers(1, 12)) for _ in range(3))
    kind = data.draw(st.sampled_from(KINDS))
    triggers = data.draw(st.integers(1, 5))
    seed = data.draw(st.integers(0, 99))
    case = make_case(kind, batch, height, width, data.draw(st.booleans()), triggers, seed)
    for name in ("trigger_id", "position"):
        if data.draw(st.booleans()):
            del case[name]
    images = random_images(batch, height, width, seed=seed)
    options = {"dtype": data.draw(st.sampled_from(DTYPES))}
    options["layout"] = data.draw(st.sampled_from(["nchw", "channels_last"]))
    options["input_layout"] = data.draw(st.sampled_from(["nhwc", "nchw"]))
    check_gradients(images, case, **options)


def test_gradients_of_any_stride_and_a_real_size(isa):  # noqa: F811
    """An expanded gradient (of a sum), a transposed one; 224 x 224 takes 16 slices, 49 tiles."""
    images = random_images(20, 224, 224)
    case = make_case("mask1", 20, 224, 224, whole=True, triggers=1)
    table = case["triggers"]
    for layout in ("nchw", "channels_last"):
        out = trigger_normalize(images, **case, **NORM, layout=layout, quantize=False)
        ones = torch.autograd.grad(out, [table.pattern, table.mask], torch.ones_like(out))
        out = trigger_normalize(images, **case, **NORM, layout=layout, quantize=False)
        expanded = torch.autograd.grad(out.sum(), [table.pattern, table.mask])
        assert all(torch.equal(a, b) for a, b in zip(ones, expanded, strict=True))
        turned = torch.randn(20, 3, 224, 224).transpose(2, 3)
        out = trigger_normalize(images, **case, **NORM, layout=layout, quantize=False)
        a = torch.autograd.grad(out, table.pattern, turned, retain_graph=True)[0]
        assert torch.equal(a, torch.autograd.grad(out, table.pattern, turned.contiguous())[0])
    s = (case["trigger_id"] >= 0) * case["strength"]
    want = s.sum() * table.mask.double() / torch.tensor(STD).double().view(3, 1, 1)
    assert relative(expanded[0], want.detach()) <= TOLERANCE


def test_slices_and_order():
    assert [num_slices(b, t, 50176) for b, t in ((128, 1), (5, 1), (0, 1), (128, 4), (9, 99))] == [
        *(16, 5, 1, 4, 1)
    ]
    assert num_slices(128, 1, 256) == 64
    ids = torch.tensor([2, -1, 0, 2, 7, 0])
    order, begin = sample_order(ids, ids, 3)
    assert order.tolist() == [1, 2, 5, 0, 3, 4] and begin.tolist() == [1, 3, 3, 5]
    assert sample_order(ids, ids, 1) == (None, None)


def test_only_what_is_wanted_is_computed(monkeypatch):
    """Nothing is saved without a gradient, and each gradient comes alone."""
    calls = []
    original = _C.trigger_normalize_backward

    class Spy:
        @staticmethod
        def trigger_normalize_backward(**arguments):
            calls.append((arguments["pattern_grad"] != 0, arguments["mask_grad"] != 0))
            return original(**arguments)

    monkeypatch.setattr(GRADIENT_MODULE, "_C", Spy)
    images = random_images(4, 8, 8)
    case = make_case("mask1", 4, 8, 8)
    pattern, mask = case["triggers"].pattern, case["triggers"].mask
    both = torch.autograd.grad(trigger_normalize(images, **case, **NORM).sum(), (pattern, mask))
    for wants in ((True, False), (False, True)):
        leaves = [t.detach().requires_grad_(w) for t, w in zip((pattern, mask), wants, strict=True)]
        table = TriggerTable("blend", pattern=leaves[0], mask=leaves[1])
        trigger_normalize(images, **case | {"triggers": table}, **NORM).sum().backward()
        for leaf, want, expected in zip(leaves, both, wants, strict=True):
            assert torch.equal(leaf.grad, want) if expected else leaf.grad is None
    assert calls == [(True, True), (True, False), (False, True)]
    with torch.no_grad():
        assert trigger_normalize(images, **case, **NORM).grad_fn is None
    table = TriggerTable("blend", pattern=pattern.detach(), mask=mask.detach())
    out = trigger_normalize(images, **case | {"triggers": table}, **NORM)
    assert out.grad_fn is None and not out.requires_grad
    out, poisoned = trigger_normalize(images, **case, **NORM, return_images=True)
    assert out.requires_grad and not poisoned.requires_grad
    grads = torch.autograd.grad(out.sum(), (pattern, mask))
    assert all(torch.equal(a, b) for a, b in zip(grads, both, strict=True))


def test_an_empty_batch_gives_zeros(isa):  # noqa: F811
    case = make_case("mask3", 0, 8, 8)
    images = torch.empty(0, 8, 8, 3, dtype=torch.uint8)
    trigger_normalize(images, **case, **NORM).sum().backward()
    assert not case["triggers"].pattern.grad.any() and not case["triggers"].mask.grad.any()


def test_trigger_inversion_finds_the_trigger():
    """The use it is made for: descend to a known pattern and mask."""
    g = torch.Generator().manual_seed(0)
    images = random_images(16, 8, 8)
    secret = TriggerTable("blend", pattern=torch.rand(1, 3, 8, 8, generator=g))
    mask = (torch.rand(1, 1, 8, 8, generator=g) > 0.5).float()
    secret = TriggerTable("blend", pattern=secret.pattern, mask=mask)
    want = trigger_normalize(images, triggers=secret, quantize=False, **NORM)
    raw = [torch.zeros(1, c, 8, 8, requires_grad=True) for c in (3, 1)]
    optimizer = torch.optim.Adam(raw, lr=0.2)
    for _ in range(150):
        pattern, found = (r.sigmoid() for r in raw)
        table = TriggerTable("blend", pattern=pattern, mask=found)
        loss = (trigger_normalize(images, triggers=table, quantize=False, **NORM) - want).square()
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    assert (found - mask).abs().max() < 0.1
    assert ((pattern - secret.pattern) * mask).abs().max() < 0.1


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # opcheck's own
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    for kind in ("patch", "mask1_clip"):
        case = make_case(kind, 3, 6, 6)
        table = case["triggers"].to(device)
        images = random_images(3, 6, 6).to(device)
        leaves = [
            t if t is None else t.detach().requires_grad_()
            for t in vars(table).values()
            if t is None or isinstance(t, torch.Tensor)
        ][:2]
        index = [case[n].to(device) for n in ("trigger_id", "position", "strength")]
        ids = torch.arange(3, device=device)
        flags = [table.nonzero_only, table.additive, table.clip]
        plan = [0.0, 0.0, 0.5, 0.01, 0.02]
        for quantize in (True, False):
            arguments = (images, *leaves, None, *index, ids, list(MEAN), list(STD), table.mode)
            arguments += (flags, 1.0, plan, "half", 1, 0, "nhwc", "channels_last", 0)
            arguments += (torch.float32, False, quantize)
            torch.library.opcheck(torch.ops.pybackdoor.trigger_normalize_fwd.default, arguments)
        grad = torch.randn(3, 3, 6, 6, device=device)
        plain = [None if t is None else t.detach() for t in leaves]
        arguments = (grad, images, *plain, *index, ids, list(STD), table.mode, flags, 1.0, plan)
        arguments += (1, 0, "nhwc", "channels_last", 0, [True, plain[1] is not None])
        torch.library.opcheck(torch.ops.pybackdoor.trigger_normalize_bwd.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_compile(device):
    case = make_case("mask1", 3, 8, 8)
    images = random_images(3, 8, 8).to(device)
    pattern, mask = (
        t.detach().to(device).requires_grad_()
        for t in (case["triggers"].pattern, case["triggers"].mask)
    )
    index = {k: v.to(device) for k, v in case.items() if k != "triggers"}
    table = TriggerTable("blend", pattern=pattern, mask=mask)

    def step(images):
        y = trigger_normalize(images, triggers=table, **index, **NORM, dtype=torch.bfloat16)
        return (y.float() ** 2).sum()

    want = torch.autograd.grad(step(images), (pattern, mask))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(images), (pattern, mask))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


BAD = [
    (
        {"augment": Augment(noise_p=0.25)},
        "triggers that require grad go with augment.noise_p=0 (noise has no gradient), got 0.25",
    ),
    ({"strength": torch.ones(2, requires_grad=True)}, "strength is a constant, got a tensor that"),
    ({"quantize": False, "return_images": True}, "quantize=False goes without return_images"),
    (
        {"quantize": False, "augment": Augment()},
        "quantize=False goes without noise, got augment.noise_p=0.5",
    ),
]


@pytest.mark.parametrize("bad,message", BAD, ids=[m[:30] for _, m in BAD])
def test_bad_call(bad, message):
    case = make_case("blend", 2, 8, 8)
    with pytest.raises(ValueError) as caught:
        trigger_normalize(
            random_images(2, 8, 8), **case | {"sample_id": torch.arange(2)} | bad, **NORM
        )
    assert str(caught.value).startswith(f"trigger_normalize: {message}")


def test_warps_have_no_gradient():
    images, grid = random_images(2, 8, 8), torch.zeros(1, 8, 8, 2)
    table = TriggerTable("warp", grid=grid)
    with pytest.raises(ValueError, match="quantize=False goes without warps"):
        trigger_normalize(images, triggers=table, quantize=False, **NORM)
    table = TriggerTable("warp", grid=grid.requires_grad_())
    with pytest.raises(ValueError, match="triggers of mode warp have no gradient, got a grid that"):
        trigger_normalize(images, triggers=table, **NORM)
    with torch.no_grad():
        trigger_normalize(images, triggers=table, **NORM)


def test_a_second_gradient_is_refused():
    images, case = random_images(2, 8, 8), make_case("mask1", 2, 8, 8)
    out = trigger_normalize(images, **case, **NORM, quantize=False)
    grad = torch.autograd.grad(out.square().sum(), case["triggers"].mask, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="trigger_normalize: there is no second gradient"):
        grad.sum().backward()


def raw_call(**changes):
    """The native function without Python's checks; no memory is touched before it checks."""
    arguments = {
        **dict.fromkeys(("images", "grad", "pattern", "mask", "pattern_grad", "mask_grad"), 64),
        **dict.fromkeys(("trigger_id", "position", "strength", "sample_id", "partial"), 0),
        **{"order": 0, "begin": 0, "slices": 1, "image_size": (1, 8, 8)},
        **{"table_size": (1, 1, 4, 4), "mode": 2, "flags": [False] * 3, "strength_value": 1.0},
        **{"augment": False, "augment_values": [0.0] * 5, "seed": 0, "view": 0},
        **{"input_layout": 0, "layout": 0, "patch_size": 0, "dtype": 0, "std": STD},
        **{"device": -1, "stream": 0, "isa": "auto", "threads": 1},
    }
    return _C.trigger_normalize_backward(**(arguments | changes))


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"mode": 3, "pattern": 0}, "grid is required in mode warp"),
        ({"mode": 0}, "mode must be patch or blend"),
        ({"slices": 0}, "slices must be > 0"),
        ({"table_size": (2, 1, 4, 4)}, "order and begin are required with several triggers"),
        ({"order": 64}, "order and begin go together"),
        ({"pattern_grad": 0, "mask_grad": 0}, "pattern_grad or mask_grad is required"),
        ({"mask": 0}, "mask_grad needs a mask"),
        ({"image_size": (-1, 8, 8)}, "batch must be >= 0"),
        (
            {"augment": True, "sample_id": 64, "augment_values": (0.5, 0.2, 0, 0.1, 0.2)},
            "poisoned images and noise have no gradient",
        ),
        ({"isa": "avx1024", "image_size": (0, 8, 8)}, "instruction set avx1024 is not usable"),
        ({"isa": "lanes0", "image_size": (0, 8, 8)}, "lanes<n> needs n > 0"),
    ],
)
def test_native_guards(changes, message):
    with pytest.raises(ValueError, match=message.replace("<", "<")):
        raw_call(**changes)


def test_nothing_is_written_beside_the_gradients(isa, monkeypatch):  # noqa: F811
    guards = []

    def guarded(pattern, mask, wanted):
        outputs = []
        for like in (pattern, mask):
            buffer = torch.full((like.numel() + 64,), 77.0)
            guards.append((buffer, like.numel()))
            outputs.append(buffer[33 : 33 + like.numel()].view(like.shape))
        return tuple(outputs)

    monkeypatch.setattr(GRADIENT_MODULE, "_allocate", guarded)
    for height, width in SIZES:
        case = make_case("mask3", 5, height, width)
        out = trigger_normalize(random_images(5, height, width), **case, **NORM)
        torch.autograd.grad(out.sum(), [case["triggers"].pattern, case["triggers"].mask])
    assert len(guards) == 2 * len(SIZES)
    for buffer, count in guards:
        inside = buffer[33 : 33 + count]
        assert (buffer[:33] == 77).all() and (buffer[33 + count :] == 77).all()
        assert not (inside == 77).any()


def test_every_instruction_set_is_listed():
    assert set(_C.isas()) <= set(ISAS)
