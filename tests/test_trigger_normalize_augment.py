"""Noise and erasing of trigger_normalize: Philox, the normals, statistics, and the keys."""

import math
import sys

import pytest
import torch
from trigger_normalize_cases import (
    DEVICES,
    MEAN,
    STD,
    isa,  # noqa: F401
    random_case,
    random_images,
)

from pybackdoor import reference
from pybackdoor._native import _C
from pybackdoor.ops import Augment, trigger_normalize

NORM = {"mean": MEAN, "std": STD}
# The reference draws its normals in fp64, the kernels in fp32: 1e-6 of noise, divided by std.
TOLERANCES = {torch.float32: (1e-5, 0), torch.float16: (2e-3, 1e-3), torch.bfloat16: (2e-2, 8e-3)}
NOISY = Augment(noise_p=1.0, erase_p=0.0)
ERASED = Augment(noise_p=0.0, erase_p=1.0)
ONES = 0xFFFFFFFF
# Random123's kat_vectors for philox4x32-10: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter,key,want", KNOWN)
def test_philox_known_answers(counter, key, want):
    seed = key[0] | key[1] << 32
    assert _C.philox(counter, seed) == want
    sample = torch.tensor([counter[2] | counter[3] << 32 if counter[3] < 1 << 31 else -1])
    words = reference.philox_uint32(
        seed, counter[1] & 255, counter[1] >> 8, sample, torch.tensor([counter[0]])
    )
    assert tuple(words[0, 0].tolist()) == want


def test_philox_words_of_large_seeds_and_negative_ids():
    for seed, sample in ((1 << 63, -5), ((1 << 64) - 1, 1 << 40), (-1, 0)):
        words = reference.philox_uint32(seed, 1, 9, torch.tensor([sample]), torch.arange(3))
        for block in range(3):
            counter = (block, 1 | 9 << 8, sample & ONES, sample >> 32 & ONES)
            assert tuple(words[0, block].tolist()) == _C.philox(counter, seed % (1 << 64))


def test_normals_are_standard_and_independent():
    n = reference.noise_normals(0, 0, torch.arange(20), (64, 64)).double()
    count = n.numel()
    assert abs(n.mean()) < 4 / count**0.5
    assert abs(n.var() - 1) < 4 * (2 / count) ** 0.5
    assert abs((n**4).mean() - 3) < 4 * (96 / count) ** 0.5
    assert abs((n.abs() > 1.959964).double().mean() - 0.05) < 4 * (0.05 * 0.95 / count) ** 0.5
    flat = n.flatten(1)
    for lag in (1, 2, 3, 4):  # within a pair, between pairs, between blocks
        assert abs((flat[:, lag:] * flat[:, :-lag]).mean()) < 4 / count**0.5
    assert abs((flat[0] * flat[1]).mean()) < 4 / flat.shape[1] ** 0.5  # between samples


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", ["half", "symmetric"])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_noise_and_erasing_agree_with_the_reference(dtype, noise, device, isa):  # noqa: F811
    atol, rtol = TOLERANCES[dtype]
    augment = Augment(noise=noise)
    for height, width in ((5, 7), (48, 33)):
        case = random_case("patch", 24, height, width)
        images = random_images(24, height, width)
        options = {"augment": augment, "sample_id": torch.arange(24) * 3, "seed": 11, "view": 4}
        options |= {"dtype": dtype, **NORM}
        want = reference.trigger_normalize(images, **case, **options)
        case["triggers"] = case["triggers"].to(device)
        got = trigger_normalize(images.to(device), **case, **options).cpu()
        noisy, square = reference.augment_decisions(
            augment, 11, 4, options["sample_id"], (height, width)
        )
        assert noisy.any() and not noisy.all() and (square[:, 2] > 0).any()
        assert torch.equal(got[~noisy], want[~noisy])  # exact where no noise is drawn
        torch.testing.assert_close(got[noisy], want[noisy], atol=atol, rtol=rtol)
        assert torch.equal(got == 0, want == 0)


def test_all_kernels_draw_the_same_bits(monkeypatch):
    images, ids = random_images(6, 17, 33), torch.arange(6)
    results = []
    for name in (*_C.isas(), "lanes1", "lanes32"):
        monkeypatch.setenv("PYBACKDOOR_CPU_ISA", name)
        results.append(trigger_normalize(images, augment=NOISY, sample_id=ids, seed=5, **NORM))
    assert all(torch.equal(results[0], r) for r in results[1:])


def pixel_noise(noise, std=0.2, level=128):
    """The noise that reaches mid-grey images, in pixel units."""
    images = torch.full((8, 64, 64, 3), level, dtype=torch.uint8)
    augment = Augment(noise_p=1.0, noise_std=std, noise=noise, erase_p=0.0)
    out = trigger_normalize(
        images, mean=(0.0,) * 3, std=(1.0,) * 3, augment=augment, sample_id=torch.arange(8)
    )
    return (out - torch.tensor(level / 255)).double()


def test_half_noise_is_a_rectified_normal():
    noise = pixel_noise("half", std=0.05)
    assert noise.min() >= 0
    assert abs((noise == 0).double().mean() - 0.5) < 4 * 0.5 / noise.numel() ** 0.5
    assert abs(noise.mean() - 0.05 / math.sqrt(2 * math.pi)) < 1e-3
    assert abs((noise**2).mean() - 0.05**2 / 2) < 1e-4


def test_symmetric_noise_has_the_stated_deviation_and_is_clipped():
    noise = pixel_noise("symmetric", std=0.05)
    assert abs(noise.mean()) < 1e-3 and abs(noise.std() - 0.05) < 1e-3
    wild = pixel_noise("symmetric", std=5.0)
    assert wild.min() == -torch.tensor(128 / 255) and abs(wild.max() - 127 / 255) < 1e-6


def test_coins_have_their_probabilities():
    ids = torch.arange(20000)
    for p in (0.0, 0.1, 0.5, 1.0):
        augment = Augment(noise_p=p, erase_p=p)
        noisy, square = reference.augment_decisions(augment, 3, 0, ids, (32, 32))
        for coin in (noisy, square[:, 2] > 0):
            share = coin.double().mean().item()
            assert abs(share - p) <= 4 * (p * (1 - p) / len(ids)) ** 0.5


def test_erased_squares_cover_their_share_of_the_image_everywhere(isa):  # noqa: F811
    images, ids = torch.full((64, 224, 224, 3), 200, dtype=torch.uint8), torch.arange(64)
    out = trigger_normalize(images, augment=ERASED, sample_id=ids, **NORM)
    zero = (out == 0).all(1)
    area = zero.sum((1, 2))
    side = area.double().sqrt()
    assert torch.equal(side, side.round())  # squares
    assert side.min() >= 16 and side.max() <= 22 and len(side.unique()) >= 5
    _, square = reference.augment_decisions(ERASED, 0, 0, ids, (224, 224))
    for mask, (y, x, s) in zip(zero, square.tolist(), strict=True):
        assert mask[y : y + s, x : x + s].all() and mask.sum() == s * s
    for corner in (square[:, 0], square[:, 1]):
        assert corner.min() < 30 and corner.max() > 170
    assert ((out == 0) == zero[:, None]).all()  # all channels alike


def test_small_and_large_areas_stay_inside_the_image():
    for size in ((1, 1), (2, 9), (32, 32)):
        for area in ((1e-6, 1e-6), (1.0, 1.0)):
            augment = Augment(erase_p=1.0, erase_area=area)
            _, square = reference.augment_decisions(augment, 0, 0, torch.arange(50), size)
            y, x, side = square.T
            assert side.min() >= 1 and (y + side).max() <= size[0] and (x + side).max() <= size[1]


@pytest.mark.parametrize("device", DEVICES)
def test_keyed_by_sample_seed_and_view_not_by_position_or_layout(device):
    images = random_images(6, 16, 48).to(device)
    ids = torch.tensor([7, -3, 1 << 40, 12, 0, 5])
    options = {"augment": Augment(), "seed": 9, "view": 2, **NORM}
    want = trigger_normalize(images, sample_id=ids, **options)
    order = torch.tensor([3, 0, 5])
    assert torch.equal(
        trigger_normalize(images[order], sample_id=ids[order], **options), want[order.to(device)]
    )
    last = trigger_normalize(images, sample_id=ids, layout="channels_last", **options)
    assert torch.equal(last, want)
    patches = trigger_normalize(
        images, sample_id=ids, layout="patchified", patch_size=16, **options
    )
    planes = patches.view(6, 3, 3, 16, 16).permute(0, 2, 3, 1, 4).reshape(6, 3, 16, 48)
    assert torch.equal(planes, want)
    nchw = images.permute(0, 3, 1, 2)
    assert torch.equal(trigger_normalize(nchw, sample_id=ids, input_layout="nchw", **options), want)
    for change in ({"seed": 10}, {"view": 3}, {"seed": 9 + (1 << 32)}):
        other = trigger_normalize(images, sample_id=ids, **{**options, **change})
        assert not torch.equal(other, want)
    again = trigger_normalize(images, sample_id=ids + 1, **options)
    assert not torch.equal(again, want)


def test_poisoned_images_carry_neither_noise_nor_holes():
    images = random_images(4, 32, 32)
    augment = Augment(noise_p=1.0, erase_p=1.0)
    _, poisoned = trigger_normalize(
        images, augment=augment, sample_id=torch.arange(4), return_images=True, **NORM
    )
    assert torch.equal(poisoned, images)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("at_once", [1, 7000, 1 << 21])  # one image, two of them, all
def test_normalised_floats_get_the_same_augmentation(device, at_once, monkeypatch):
    module = sys.modules["pybackdoor.reference.trigger_normalize"]
    monkeypatch.setattr(module, "_AT_ONCE", dict.fromkeys(("cpu", "cuda"), at_once))
    images, ids = random_images(24, 32, 32).to(device), torch.arange(24, device=device)
    options = {"augment": Augment(), "seed": 3, "view": 1, "sample_id": ids}
    want = trigger_normalize(images, **NORM, **options)
    floats = trigger_normalize(images, **NORM)
    got = reference.augment_normalized(floats, MEAN, STD, **options)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    noisy, square = reference.augment_decisions(Augment(), 3, 1, ids, (32, 32))
    untouched = ~noisy & (square[:, 2] == 0)
    assert untouched.any() and torch.equal(got[untouched], floats[untouched])
    silent = options | {"augment": Augment(noise_p=0.0, erase_p=0.0)}
    assert torch.equal(reference.augment_normalized(floats, MEAN, STD, **silent), floats)
    without = reference.augment_normalized(floats, None, None, **options)
    erased = torch.where((want == 0) & (square[:, 2] > 0)[:, None, None, None], 0, floats)
    assert torch.equal(without, erased)


def test_augment_normalized_names_bad_arguments():
    images = torch.zeros(2, 3, 8, 8)
    options = {"augment": Augment(), "seed": 0, "view": 0}
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\], got \[3, 8, 8\]"):
        reference.augment_normalized(images[0], MEAN, STD, sample_id=torch.arange(3), **options)
    with pytest.raises(ValueError, match=r"sample_id must be \[2\] like images, got \[3\]"):
        reference.augment_normalized(images, MEAN, STD, sample_id=torch.arange(3), **options)
