"""trigger_normalize against CPU torch and torchvision, bit for bit, and against the reference."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from trigger_normalize_cases import (
    DEVICES,
    DTYPES,
    ISAS,
    MEAN,
    OP_MODULE,
    STD,
    TABLES,
    isa,  # noqa: F401
    natural_chain,
    ran,  # noqa: F401
    random_case,
    random_images,
)

from pybackdoor import reference
from pybackdoor.ops import Augment, TriggerTable, trigger_normalize

NORM = {"mean": MEAN, "std": STD}
# 1x1 and 3x31: below a chunk of 16; 5x7 and 17x33: odd rows, chunks across rows; 16x16: whole
# chunks; 48x32: aligned; 64x80: two whole runs of 2048 pixels and half a one.
SIZES = [(1, 1), (3, 31), (5, 7), (16, 16), (17, 33), (48, 32), (64, 80)]


def all_pairs(levels_t):
    """[1, 256, n, 3] images holding every level against each of n values of t: [1, 3, 256, n]."""
    n = levels_t.numel()
    images = torch.arange(256, dtype=torch.uint8).view(1, 256, 1, 1).expand(1, 256, n, 3)
    return images.contiguous(), levels_t.view(1, 1, 1, n).expand(1, 3, 256, n).contiguous()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strength", [0.0, 0.03, 0.15, 0.2, 0.5, 1 / 3, 1.0])
def test_blend_equals_torchvision_on_all_level_pairs(strength, device, isa):  # noqa: F811
    images, pattern = all_pairs(torch.arange(256) / 255)
    want, want_images = natural_chain(
        images, lambda x, i: strength * pattern[i] + (1 - strength) * x
    )
    table = TriggerTable("blend", pattern=pattern).to(device)
    got, poisoned = trigger_normalize(
        images.to(device), triggers=table, strength=strength, return_images=True, **NORM
    )
    assert torch.equal(poisoned.cpu(), want_images)
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("clip", [False, True])
def test_wild_triggers_equal_torchvision(clip, device, isa):  # noqa: F811
    """+-1, N(0, 1), values far outside [0, 1]: they wrap modulo 256, or are clipped."""
    g = torch.Generator().manual_seed(3)
    values = torch.cat([torch.randn(200, generator=g), torch.tensor([-1.0, 1.0, 1.2, 2.0, -0.5])])
    images, pattern = all_pairs(values)

    def blend(x, i):
        mixed = 0.3 * pattern[i] + 0.7 * x
        # The out-of-range cast is spelled out: torch leaves it to the machine.
        mixed = mixed.clamp(0, 1) if clip else mixed
        return ((mixed * 255).to(torch.int32) & 255).to(torch.uint8)

    want, want_images = natural_chain(images, blend)
    table = TriggerTable("blend", pattern=pattern, clip=clip).to(device)
    got, poisoned = trigger_normalize(
        images.to(device), triggers=table, strength=0.3, return_images=True, **NORM
    )
    assert torch.equal(poisoned.cpu(), want_images)
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("device", DEVICES)
def test_known_levels_of_values_outside_the_range(device, isa):  # noqa: F811
    values = torch.tensor([-1.0, -0.5, 1.0, 1.2, 2.0, 3e7, -1e30, 3.4e38, 0.0])
    # 3e7 * 255 and beyond are multiples of 256.
    want = torch.tensor([1, 129, 255, 50, 254, 0, 0, 0, 0])
    table = TriggerTable("patch", pattern=values.expand(1, 3, 1, 9).contiguous()).to(device)
    images = random_images(1, 1, 9).to(device)
    _, poisoned = trigger_normalize(images, triggers=table, return_images=True, **NORM)
    assert torch.equal(poisoned.cpu()[0, 0, :, 1].long(), want)
    assert torch.equal(reference.quantize(values), want)


def test_level_values_are_true_divisions():
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    want, _ = natural_chain(images)
    assert torch.equal(trigger_normalize(images, **NORM), want)
    assert torch.equal(reference.normalize_table(MEAN, STD)[0], want[0, 0].flatten())


@pytest.mark.parametrize("device", DEVICES)
def test_warp_equals_grid_sample(device, isa):  # noqa: F811
    """torch may contract to FMA: at most one level off, in at most 1e-4 of the elements."""
    images = random_images(2, 33, 47)
    grid = random_case("warp", 2, 33, 47)["triggers"].grid
    grid[:, :3] = grid[:, :3].clamp(-1, 1)  # exactly the edges too

    def warp(x, i):
        return F.grid_sample(x[None], grid[i : i + 1], align_corners=True)[0]

    _, want = natural_chain(images, warp)
    _, got = trigger_normalize(
        images.to(device),
        triggers=TriggerTable("warp", grid=grid).to(device),
        trigger_id=torch.tensor([0, 1]),
        return_images=True,
        **NORM,
    )
    difference = (got.cpu().int() - want.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= 1e-4


def wanted(images, case, **options):
    """The reference's output and images; keywords as the op's."""
    plain = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    if "triggers" in case:
        plain["triggers"] = case["triggers"].to("cpu")
    return reference.trigger_normalize(images, **plain, **NORM, return_images=True, **options)


@functools.lru_cache(maxsize=128)  # of a test's settings, for the next instruction set
def wanted_of(kind, batch, height, width, **options):
    images = random_images(batch, height, width, options["input_layout"])
    return wanted(images, random_case(kind, batch, height, width), **options)


def compare(images, case, device, names, expected, want=None, **options):
    """Op against reference: same bits, strides and dtype. names: what ran."""
    got = trigger_normalize(images.to(device), **case, **NORM, return_images=True, **options)
    assert not names or names[-1] == (expected if device == "cpu" else "cuda")
    # Without the poisoned images a whole blend takes a path of its own.
    alone = trigger_normalize(images.to(device), **case, **NORM, **options)
    assert torch.equal(alone, got[0]) and alone.stride() == got[0].stride()
    want = want or wanted(images, case, **options)
    if "triggers" in case and case["triggers"].mode == "warp":
        # grid_sample may contract to FMA: one level, rarely. From there on all is exact.
        difference = (got[1].cpu().int() - want[1].int()).abs()
        assert difference.sum() <= 1 + 1e-4 * difference.numel()
        want = reference.trigger_normalize(got[1].cpu(), **NORM, return_images=True, **options)
    assert torch.equal(got[1].cpu(), want[1])
    assert got[0].dtype == want[0].dtype
    assert torch.equal(got[0].cpu(), want[0])


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("input_layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("kind", TABLES)
def test_every_mode_layout_and_dtype(kind, input_layout, device, isa, ran):  # noqa: F811
    for height, width in SIZES:
        for batch in (1, 5) if height < 64 else (2,):
            images = random_images(batch, height, width, input_layout)
            case = random_case(kind, batch, height, width, device=device)
            p = 16 if height % 16 == 0 and width % 16 == 0 else 1
            for layout, patch_size in (("nchw", None), ("channels_last", None), ("patchified", p)):
                for dtype in DTYPES:
                    options = {"layout": layout, "patch_size": patch_size, "dtype": dtype}
                    options["input_layout"] = input_layout
                    want = wanted_of(kind, batch, height, width, **options)
                    compare(images, case, device, ran, isa, want, **options)
    assert ran


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "layout,patch_size", [("nchw", None), ("patchified", 14), ("patchified", 32)]
)
@pytest.mark.parametrize("kind", ["patch", "blend"])
def test_real_size(kind, layout, patch_size, device, isa, ran):  # noqa: F811
    """More than 4 MiB of output: from the pool, with streaming stores; p = 14 straddles chunks."""
    images = random_images(8, 224, 224)
    case = random_case(kind, 8, 224, 224, device=device)
    compare(images, case, device, ran, isa, layout=layout, patch_size=patch_size)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("input_layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("kind", ["none", "patch", "blend", "clipped"])
def test_streamed_stores(kind, input_layout, device, isa, ran):  # noqa: F811
    """Every dtype's output exceeds 4 MiB, and whole runs go past the caches."""
    if isa.startswith("lanes"):
        pytest.skip("the lanes driver has no streamed stores")
    images = random_images(3, 512, 480, input_layout)
    case = random_case("blend" if kind == "clipped" else kind, 3, 512, 480, device=device)
    if kind == "clipped":
        case["triggers"] = TriggerTable("blend", pattern=case["triggers"].pattern, clip=True)
    for dtype in DTYPES:
        assert images.numel() * dtype.itemsize > 4 << 20
        compare(images, case, device, ran, isa, input_layout=input_layout, dtype=dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["patch", "window", "mask3", "nonzero"])
def test_a_window_is_cropped_at_the_edge(kind, device, isa, ran, monkeypatch):  # noqa: F811
    """Positions that only a CUDA tensor can hold, as they are not looked at there."""
    monkeypatch.setattr(OP_MODULE, "check_values", lambda *_: None)
    far = 1 << 40  # saturates at the end of 32 bits
    places = [-far, 1 - far, -9, -8, -7, -1, 0, 3, 16, 17, 18, 30, (1 << 31) - 1, far]
    position = torch.tensor(list(itertools.product(places, repeat=2)))
    images = random_images(len(position), 17, 19)
    case = random_case(kind, len(position), 17, 19)
    case = {"triggers": case["triggers"], "strength": case["strength"], "position": position}
    poisoned = reference.trigger_normalize(images, **case, **NORM, return_images=True)[1]
    changed = (poisoned != images).any(-1).flatten(1).any(1)
    h, w = case["triggers"].pattern.shape[2:]
    y, x = position.unbind(1)
    assert torch.equal(changed, (y > -h) & (y < 17) & (x > -w) & (x < 19))
    case = {k: v.to(device) for k, v in case.items()}
    compare(images, case, device, ran, isa)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "patchified"])
def test_the_reference_as_backend_gives_outputs_of_the_same_kind(layout, monkeypatch):
    images, case = random_images(2, 8, 8), random_case("nonzero", 2, 8, 8)
    options = {"layout": layout, "patch_size": 4 if layout == "patchified" else None, **NORM}
    options |= {"augment": Augment(noise_p=0.0, erase_p=1.0), "sample_id": torch.arange(2)}
    want = trigger_normalize(images, **case, **options, return_images=True)
    monkeypatch.setenv("PYBACKDOOR_BACKEND", "reference")
    got = trigger_normalize(images, **case, **options, return_images=True)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype
    assert torch.equal(trigger_normalize(images, **case, **options), want[0])
    got[0].add_(torch.zeros(1, requires_grad=True))  # a tensor of its own, not a view
    untouched = trigger_normalize(images, return_images=True, **NORM)[1]
    assert torch.equal(untouched, images) and untouched.data_ptr() != images.data_ptr()


@pytest.mark.parametrize("device", DEVICES)
def test_empty_batch(device, isa):  # noqa: F811
    images = torch.empty(0, 8, 8, 3, dtype=torch.uint8, device=device)
    case = random_case("blend", 0, 8, 8, device=device)
    out, poisoned = trigger_normalize(images, **case, **NORM, return_images=True)
    assert out.shape == (0, 3, 8, 8) and poisoned.shape == (0, 8, 8, 3)


@pytest.mark.parametrize("shift", [0, 3])  # aligned to 64 B, and to nothing but the element
@pytest.mark.parametrize("kind", ["none", "patch", "blend", "warp"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "patchified"])
def test_nothing_is_written_beside_the_outputs(layout, kind, shift, isa, monkeypatch):  # noqa: F811
    allocate = OP_MODULE._allocate
    guards = []

    def guarded(*arguments, **keywords):
        outputs = []
        for tensor in allocate(*arguments, **keywords):
            if not tensor.numel():  # no images are wanted
                outputs.append(tensor)
                continue
            buffer = torch.full((tensor.numel() + 256,), 77, dtype=tensor.dtype)
            first, last = 128 + shift, 128 + shift + tensor.numel()
            guards.append(torch.cat([buffer[:first], buffer[last:]]))
            guards.append((buffer, first, last))
            placed = torch.empty(0, dtype=tensor.dtype)
            placed.set_(buffer.untyped_storage(), first, tensor.shape, tensor.stride())
            outputs.append(placed)
        return tuple(outputs)

    monkeypatch.setattr(OP_MODULE, "_allocate", guarded)
    plans = (None, Augment(noise_p=1.0), Augment(noise_p=0.0, erase_p=1.0))
    runs = dict.fromkeys([(5, 7), (17, 33), (48, 32)], plans)
    if layout == "nchw" and not isa.startswith("lanes"):
        runs[512, 480] = (None,)  # beyond 4 MiB: streamed stores
    made = {size: (random_images(3, *size), random_case(kind, 3, *size)) for size in runs}
    each = [(size, augment) for size in runs for augment in runs[size]]
    for (size, augment), dtype, return_images in itertools.product(each, DTYPES, (True, False)):
        guards.clear()
        images, case = made[size]
        options = {"layout": layout, "patch_size": 1 if layout == "patchified" else None}
        options |= {"dtype": dtype, "augment": augment, "sample_id": torch.arange(3)}
        got = trigger_normalize(images, **case, **NORM, **options, return_images=return_images)
        assert len(guards) == (4 if return_images else 2)
        for before, (buffer, first, last) in zip(guards[::2], guards[1::2], strict=True):
            assert torch.equal(torch.cat([buffer[:first], buffer[last:]]), before)
            assert not (buffer[first:last] == 77).all()
        assert (got[0] if return_images else got).isfinite().all()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_stride_and_dtype(data):
    """Hypothesis: transposed, sliced and expanded images and index tensors of any width."""
    batch, height, width = (data.draw(st.integers(0 if k == 0 else 1, 12)) for k in range(3))
    input_layout = data.draw(st.sampled_from(["nhwc", "nchw"]))
    images = random_images(
        batch, height, 2 * width, input_layout, seed=data.draw(st.integers(0, 9))
    )
    axis = 2 if input_layout == "nhwc" else 3
    images = (
        images.narrow(axis, 0, width)
        if data.draw(st.booleans())
        else images.unflatten(axis, (width, 2)).select(axis + 1, 1)
    )
    if data.draw(st.booleans()):
        images = images.flip(0)
    case = random_case(data.draw(st.sampled_from(TABLES)), batch, height, width)
    if "position" in case:
        kind = data.draw(st.sampled_from([torch.int16, torch.int32, torch.int64]))
        case["position"] = case["position"].to(kind).t().contiguous().t()
    if case:
        case["trigger_id"] = case["trigger_id"].to(
            data.draw(st.sampled_from([torch.int32, torch.int64]))
        )
        case["strength"] = case["strength"].to(
            data.draw(st.sampled_from([torch.float32, torch.float64]))
        )
    options = {"layout": data.draw(st.sampled_from(["nchw", "channels_last"]))}
    options["dtype"] = data.draw(st.sampled_from(DTYPES))
    compare(images, case, "cpu", [], None, input_layout=input_layout, **options)


def test_defaults_use_trigger_zero_at_the_corner_with_full_strength():
    images = random_images(2, 6, 6)
    pattern = torch.rand(2, 3, 2, 2)
    table = TriggerTable("blend", pattern=pattern)
    _, got = trigger_normalize(images, triggers=table, return_images=True, **NORM)
    assert torch.equal(
        got[:, :2, :2], reference.quantize(pattern[0]).permute(1, 2, 0).byte().expand(2, 2, 2, 3)
    )
    assert torch.equal(got[:, 2:], images[:, 2:]) and torch.equal(got[:, :, 2:], images[:, :, 2:])


def test_threads_do_not_change_the_result():
    images = random_images(16, 64, 64)
    case = random_case("blend", 16, 64, 64)
    options = {"augment": Augment(), "sample_id": torch.arange(16), **NORM}
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(trigger_normalize(images, **case, **options))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def _arguments(kind, augment, device):
    images = random_images(2, 8, 8).to(device)
    case = random_case(kind, 2, 8, 8, device=device)
    table = case.pop("triggers", None)
    plan = [0.5, 0.2, 0.5, 0.005, 0.01] if augment else []
    names = ("trigger_id", "position", "strength")
    parts = (None,) * 3 if table is None else (table.pattern, table.mask, table.grid)
    ids = torch.arange(2, device=device)
    flags = [False] * 3 if table is None else [table.nonzero_only, table.additive, table.clip]
    return (
        *(images, *parts, *(case.get(n) for n in names), ids, list(MEAN), list(STD)),
        *("none" if table is None else table.mode, flags, 1.0, plan, "half", 1, 0),
        *("nhwc", "channels_last" if augment else "nchw", 0, torch.bfloat16, augment),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["none", "patch", "mask1", "warp"])
def test_opcheck(kind, device):
    for augment in (False, True):
        arguments = _arguments(kind, augment, device)
        torch.library.opcheck(torch.ops.pybackdoor.trigger_normalize_fwd.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_compile(device):
    case = random_case("blend", 3, 8, 8, device=device)

    def step(images):
        return trigger_normalize(images, **case, **NORM, dtype=torch.bfloat16) * 2

    images = random_images(3, 8, 8).to(device)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images), step(images))
