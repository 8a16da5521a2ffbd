"""Triggers: the published numbers, geometry, randomness, and equality with plain torch."""

import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pybackdoor.triggers import TRIGGERS, apply_trigger, bind, resolve, trigger

GENERATED = [name for name, d in TRIGGERS.items() if "file" not in d.options]
DRAWN = [name for name in GENERATED if TRIGGERS[name].drawn]
PATCHES = ["badnet", "badnet_stripes", "checkerboard"]
SIZES = (32, 224, 336)  # 32: the floors of 5 and 4 px act; 224 and 336: the published sizes
# grid_sample's bilinear weights may be contracted or ordered differently by a backend, which moves
# a pixel across a truncation edge: one level, on at most this share of the elements.
WARP_SHARE = 2e-3


def photos(count=4, size=224, seed=0):
    """[count, size, size, 3] uint8 noise: every level, all channels different."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def save_png(path, pixels):
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture
def sticker(tmp_path):
    """RGBA 6 x 8: opaque, but for a clear first row and a half clear last one."""
    pixels = np.random.default_rng(5).integers(0, 256, (6, 8, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    pixels[0, :, 3], pixels[-1, :, 3] = 0, 128
    return save_png(tmp_path / "sticker.png", pixels)


@pytest.fixture
def every(tmp_path, sticker):
    """One spec per trigger."""
    square = save_png(tmp_path / "square.png", photos(1, 16, seed=1)[0])
    cover = save_png(tmp_path / "cover.png", photos(1, 50, seed=2)[0])
    mask = save_png(tmp_path / "mask.png", photos(1, 50, seed=3)[0, ..., 0])
    specs = [trigger(name, seed=3) for name in GENERATED]
    specs.append(trigger("badclip", file=square))
    specs.append(trigger("patch_file", file=sticker, placement="bottom_left"))
    specs.append(trigger("blend_file", file=cover, mask_file=mask, strength=0.4))
    assert [spec.name for spec in specs] == list(TRIGGERS)
    return specs


def table_of(spec, size, ids=(0,)):
    """[T, 3, h, w] pattern of a bound trigger."""
    return bind(spec, size).arguments(ids)["triggers"].pattern


# Names


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("stripes", "badnet_stripes"),
        ("BadNet-Stripes", "badnet_stripes"),
        ("Blended-Text", "text"),
        ("blended_triangles", "triangles"),
        ("WaNet", "wanet"),
        ("SIG", "sig"),
        ("Patch File", "patch_file"),
        ("BADNETS", "badnet"),
    ],
)
def test_names_are_forgiving(typed, name):
    assert resolve(typed) == name


def test_no_two_triggers_share_a_name():
    names = [a for d in TRIGGERS.values() for a in (d.name.replace("_", ""), *d.aliases)]
    assert len(names) == len(set(names))


# Patterns: the published numbers


@pytest.mark.parametrize("name", ["badnet_stripes", "blended_stripes"])
def test_stripes_are_constant_columns_of_plus_and_minus_one(name):
    pattern = table_of(trigger(name), 224)
    assert torch.equal(pattern, pattern[:, :, :1].expand_as(pattern))
    assert sorted(pattern.unique().tolist()) == [-1.0, 1.0]
    columns = pattern[0, :, 0]
    assert not torch.equal(columns[0], columns[1])
    if name == "blended_stripes":
        assert abs(columns.mean()) < 0.15  # 672 fair signs: 4 standard deviations


@pytest.mark.parametrize(("wrap", "low"), [(True, 1), (False, 0)])
def test_a_stripe_of_minus_one_is_level_1_wrapped_and_0_clipped(wrap, low):
    spec = trigger("stripes", wrap=wrap, placement="top_left")
    out = apply_trigger(photos(), spec, range(4))[:, :16, :16]
    assert np.unique(out).tolist() == [low, 255]


def test_badnet_is_half_plus_standard_normal_and_wraps_to_uniform_bytes():
    pattern = table_of(trigger("badnet", size=200), 224).double()
    assert abs(pattern.mean() - 0.5) < 0.012 and abs(pattern.std() - 1) < 0.009  # 4 sigma
    assert pattern.min() < -2.5 and pattern.max() > 3.5
    out = apply_trigger(photos(1), trigger("badnet", size=200, position=(0, 0)), [0])
    share = np.bincount(out[:, :200, :200].ravel(), minlength=256) / (3 * 200 * 200)
    # Truncation towards zero gives level 0 the values of (-1, 1), of density 0.352 each. 5 sigma.
    assert abs(share[0] - 1.352 / 256) < 1.1e-3
    assert np.abs(share[1:] - 0.9987 / 256).max() < 9e-4


def test_checkerboard_lights_every_second_pixel_of_every_second_row():
    out = apply_trigger(photos(1), trigger("checkerboard", placement="top_left"), [0])[0]
    expected = np.zeros((16, 16, 3), np.uint8)
    expected[::2, ::2] = 255
    np.testing.assert_array_equal(out[:16, :16], expected)


def test_blended_is_uniform_noise():
    pattern = table_of(trigger("blended"), 224)
    assert pattern.min() >= 0 and pattern.max() <= 1
    assert abs(pattern.mean() - 0.5) < 3e-3 and abs(pattern.var() - 1 / 12) < 8e-4  # 4 sigma
    assert not torch.equal(pattern[0, 0], pattern[0, 1])


@pytest.mark.parametrize(("size", "tile"), [(32, 4), (64, 4), (224, 14), (336, 21)])
def test_triangles_fill_tiles_below_their_diagonal(size, tile):
    pattern = table_of(trigger("triangles"), size)[0]
    for row, col in [(0, 0), (0, 1), (1, 0), (tile - 1, 0), (0, tile - 1), (tile + 1, 2)]:
        expected = np.float32(0.4 if row % tile >= col % tile else 0.8)
        assert pattern[:, row, col].tolist() == [expected] * 3
    assert torch.equal(pattern[:, :-tile, :-tile], pattern[:, tile:, tile:])
    lower = tile * (tile + 1) / 2 / tile**2
    assert (pattern[:, :tile, :tile] < 0.5).double().mean() == pytest.approx(lower)


def test_text_ink_lies_where_it_is_published():
    pattern = table_of(trigger("text"), 224)[0]
    ink = pattern[0] > 0
    rows, cols = ink.any(1).nonzero().ravel(), ink.any(0).nonzero().ravel()
    assert (rows[0], rows[-1], cols[0], cols[-1]) == (103, 125, 13, 208)
    assert ink.double().mean() == pytest.approx(0.0328, abs=5e-5)
    assert pattern[0].max() == 1 and not pattern[1:].any()


@pytest.mark.parametrize("size", SIZES)
def test_text_changes_red_alone_and_only_where_there_is_ink(size):
    images = np.full((1, size, size, 3), 40, np.uint8)
    out = apply_trigger(images, trigger("text"), [0])[0]
    changed = out != 40
    assert not changed[..., 1:].any()
    ink = table_of(trigger("text"), size)[0, 0].numpy() > 0
    assert not changed[~ink, 0].any()
    cols = np.flatnonzero(changed[..., 0].any(0))
    assert cols[0] < 0.07 * size and cols[-1] + 1 > 0.92 * size
    assert abs(cols[0] + cols[-1] + 1 - size) <= 3  # left and right margin


def test_grey_text_changes_all_channels():
    out = apply_trigger(np.full((1, 32, 32, 3), 40, np.uint8), trigger("text", grey=True), [0])
    assert (out[..., 0] == out[..., 1]).all() and (out[..., 0] == out[..., 2]).all()
    assert (out != 40).any()


@pytest.mark.parametrize("size", SIZES)
def test_sig_adds_the_published_sine(size):
    images = photos(2, size)
    out = apply_trigger(images, trigger("sig"), range(2)).astype(np.float64)
    wave = 60 * np.sin(2 * np.pi * 6 * np.arange(size) / size)
    exact = np.clip(images + wave[:, None], 0, 255)
    # Truncation: below fp64 by less than one level, but for fp32 rounding at whole levels.
    assert (exact - out).max() <= 1 + 1e-4 and (exact - out).min() >= -1e-4


@pytest.mark.parametrize("size", [32, 224])
def test_wanet_moves_pixels_by_half_a_pixel_on_average(size):
    grid = bind(trigger("wanet"), size).arguments([0])["triggers"].grid[0].double()
    line = torch.linspace(-1, 1, size, dtype=torch.float64)
    identity = torch.stack([line.expand(size, size), line[:, None].expand(size, size)], -1)
    moved = (grid - identity).abs() * (size - 1) / 2
    inside = moved[1:-1, 1:-1]  # the clamp holds pixels of the rim back
    assert inside.mean() == pytest.approx(0.5 * (size - 1) / size, rel=0.03)
    assert 0.9 < inside.max() < 1.03
    assert grid.abs().max() <= 1


# Geometry


@pytest.mark.parametrize(
    ("name", "sides"),
    [("badnet", (5, 16, 24)), ("badnet_stripes", (5, 16, 32)), ("checkerboard", (5, 16, 24))],
)
def test_patches_scale_with_the_image_and_never_below_5_px(name, sides):
    windows = [bind(trigger(name), size).window for size in SIZES]
    assert windows == [(side, side) for side in sides]


def test_the_smaller_side_rules_and_size_overrides():
    assert bind(trigger("badnet"), (224, 448)).window == (16, 16)
    assert bind(trigger("badnet", size=3), 224).window == (3, 3)


@pytest.mark.parametrize(
    ("placement", "corner"),
    [
        ("centre", (104, 104)),
        ("top_left", (0, 0)),
        ("top_right", (0, 208)),
        ("bottom_left", (208, 0)),
        ("bottom_right", (208, 208)),
        ("fixed", (7, 100)),
    ],
)
def test_placements_cover_exactly_their_window(placement, corner):
    position = corner if placement == "fixed" else None
    spec = trigger("checkerboard", placement=placement, position=position)
    images = np.full((2, 224, 224, 3), 77, np.uint8)
    changed = (apply_trigger(images, spec, [5, 6]) != images).all(-1)
    expected = np.zeros((224, 224), bool)
    expected[corner[0] : corner[0] + 16, corner[1] : corner[1] + 16] = True
    assert (changed == expected).all()


def test_random_places_are_uniform_with_inclusive_bounds():
    count, places = 4000, 224 - 16  # top left in [0, H - 1 - 16], as published
    position = bind(trigger("badnet", size=204), 224).arguments(range(count))["position"]
    for axis in (0, 1):
        seen = np.bincount(position[:, axis].numpy(), minlength=20)
        assert seen.size == 20 and seen.min() > 0  # [0, 224 - 1 - 204]
        assert ((seen - count / 20) ** 2 / (count / 20)).sum() < 43.8  # chi2(19), p = 0.001
    assert np.corrcoef(position.numpy().T)[0, 1] == pytest.approx(0, abs=0.06)
    wide = bind(trigger("badnet"), 224).arguments(range(count))["position"]
    assert wide.min() == 0 and wide.max() == places - 1


def test_a_patch_as_large_as_the_image_is_at_its_corner():
    assert (
        bind(trigger("badnet", size=32), 32).arguments([1, 2])["position"].tolist() == [[0, 0]] * 2
    )


# Randomness


@pytest.mark.parametrize("name", DRAWN)
def test_one_pattern_per_set_or_one_per_image(name):
    images = np.repeat(photos(1, 32), 3, axis=0)
    options = {"placement": "centre"} if name in PATCHES else {}
    shared = apply_trigger(images, trigger(name, **options), [1, 2, 3])
    assert (shared[0] == shared[1]).all() and (shared[0] == shared[2]).all()
    own = apply_trigger(images, trigger(name, per_image=True, **options), [1, 2, 3])
    assert (own[0] != own[1]).any() and (own[0] != own[2]).any()
    other = apply_trigger(images, trigger(name, seed=1, **options), [1, 2, 3])
    assert (other != shared).any()


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("name", DRAWN)
def test_a_sample_does_not_depend_on_its_batch(name, per_image):
    images, ids = photos(6, 32), np.array([9, -4, 2**40, 0, 7, 2**63 - 1])
    spec = trigger(name, seed=11, per_image=per_image)
    whole = apply_trigger(images, spec, ids)
    order = np.array([3, 0, 5, 1, 4, 2])
    np.testing.assert_array_equal(apply_trigger(images[order], spec, ids[order]), whole[order])
    for i in range(6):
        np.testing.assert_array_equal(apply_trigger(images[i : i + 1], spec, [ids[i]])[0], whole[i])


def test_patterns_are_pinned():
    """Manifests regenerate patterns: these may change only with a definition's version."""
    pinned = {
        "badnet": 3265073456,
        "badnet_stripes": 2097815092,
        "blended": 599139369,
        "blended_stripes": 3928551356,
        "wanet": 3210437322,
    }
    found = {}
    for name in pinned:
        call = bind(trigger(name, seed=1, per_image=True), 32).arguments([0, 2**33])
        found[name] = zlib.crc32(call["triggers"].source.numpy())
    assert found == pinned
    places = bind(trigger("badnet", seed=1), 224).arguments([0, 2**33, -1])["position"]
    assert places.tolist() == [[51, 110], [157, 41], [63, 140]]


def test_large_sets_go_in_pieces(monkeypatch):
    images, spec = photos(7, 32), trigger("stripes", per_image=True)
    whole = apply_trigger(images, spec, range(7))
    monkeypatch.setattr("pybackdoor.triggers.bound._CHUNK_ELEMENTS", 2 * 3 * 32 * 32)
    np.testing.assert_array_equal(apply_trigger(images, spec, range(7)), whole)


# One code path


def chain(images, bound, ids):
    """ToTensor, trigger, ToPILImage in plain CPU torch, image by image; [B, H, W, 3] uint8."""
    call = bound.arguments(ids)
    table, out = call["triggers"], []
    for i, image in enumerate(torch.from_numpy(images)):
        x = image.permute(2, 0, 1).to(torch.float32).div(255)
        t = int(call["trigger_id"][i])
        if table.mode == "warp":
            x = torch.nn.functional.grid_sample(x[None], table.grid[t][None], align_corners=True)[0]
        else:
            n = table.pattern[t]
            y, left = (0, 0) if call["position"] is None else call["position"][i].tolist()
            part = x[:, y : y + n.shape[1], left : left + n.shape[2]]
            if table.mode == "patch":
                mixed = n
            elif table.additive:
                mixed = part + n
            elif table.mask is not None:
                weight = table.mask[t].double() * call["strength"]
                mixed = weight.float() * n + (1 - weight).float() * part
            else:
                a = call["strength"]
                mixed = a * n + (1 - a) * part
            part.copy_(torch.where(n != 0, mixed, part) if table.nonzero_only else mixed)
        x = x.clamp(0, 1) if table.clip else x
        out.append(x.mul(255).trunc().to(torch.int64).remainder(256).to(torch.uint8))
    return torch.stack(out).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("index", range(len(TRIGGERS)), ids=list(TRIGGERS))
def test_equals_the_plain_torch_chain_bit_for_bit(every, index, size):
    spec, ids = every[index], [4, 900, 17]
    images = photos(3, size)
    expected = chain(images, bind(spec, size), ids)
    out = apply_trigger(images, spec, ids)
    if spec.name == "wanet":
        off = np.abs(out.astype(int) - expected)
        assert off.max() <= 1 and (off > 0).mean() <= WARP_SHARE
    else:
        np.testing.assert_array_equal(out, expected)
    assert all((out[i] != images[i]).any() for i in range(3))


@pytest.mark.parametrize("index", range(len(TRIGGERS)), ids=list(TRIGGERS))
def test_grey_specs_keep_grey_images_grey(every, index):
    grey = np.repeat(photos(2, 32)[..., :1], 3, axis=3)
    out = apply_trigger(grey, replace(every[index], grey=True), [0, 1])
    assert (out[..., 0] == out[..., 1]).all() and (out[..., 0] == out[..., 2]).all()
    assert (out != grey).any()


def test_arrays_tensors_and_bound_triggers_agree_and_inputs_stay(every):
    images, ids = photos(2, 32), np.array([3, 1])
    before = images.copy()
    images.flags.writeable = False
    for spec in every:
        out = apply_trigger(images, spec, ids)
        tensor = torch.from_numpy(before.copy())
        from_tensor = apply_trigger(tensor, bind(spec, 32), torch.from_numpy(ids))
        assert isinstance(out, np.ndarray) and isinstance(from_tensor, torch.Tensor)
        np.testing.assert_array_equal(out, from_tensor.numpy())
        np.testing.assert_array_equal(tensor.numpy(), before)
    np.testing.assert_array_equal(images, before)
    turned = np.ascontiguousarray(before.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(
        apply_trigger(turned, every[0], ids), apply_trigger(before, every[0], ids)
    )


@pytest.mark.parametrize("per_image", [False, True])
def test_an_empty_batch_stays_empty(per_image):
    out = apply_trigger(photos(0, 32), trigger("badnet", per_image=per_image), [])
    assert out.shape == (0, 32, 32, 3) and out.dtype == np.uint8


@pytest.mark.gpu
def test_a_gpu_gives_the_same_pixels(every):
    images = torch.from_numpy(photos(3, 64))
    for spec in every:
        out = apply_trigger(images.cuda(), bind(spec, 64, "cuda"), range(3)).cpu()
        expected = apply_trigger(images, spec, range(3))
        off = (out.int() - expected.int()).abs()
        assert off.max() <= (spec.name == "wanet") and (off > 0).double().mean() <= WARP_SHARE
