"""AutoAugment by key: torchvision's own, image by image, whatever the batch."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from pybackdoor.data import autoaugment as module
from pybackdoor.data.autoaugment import autoaugment

IDS = torch.arange(96) * 7 + 1_000_000_007


def pixels(n=96, height=40, width=36):
    g = torch.Generator().manual_seed(0)
    smooth = torch.rand(n, 3, 4, 4, generator=g) * 200
    big = torch.nn.functional.interpolate(smooth, (height, width), mode="bilinear")
    noise = torch.randint(0, 40, big.shape, generator=g)
    return (big + noise).to(torch.uint8)


def test_equals_torchvision_under_the_same_draws(monkeypatch):
    images = pixels()
    found = autoaugment(images, seed=3, view=2, sample_id=IDS)
    draws = module._uniform(3, 2, IDS.numpy())
    policies = (draws[0] * 25).astype(int)
    assert set(policies) == set(range(25))  # every policy is compared
    theirs = v2.AutoAugment()
    for i, image in enumerate(images):
        uniform = []
        for half in range(2):
            name, probability, _ = module._POLICIES[policies[i]][half]
            uniform.append(draws[1 + half, i])
            if draws[1 + half, i] < probability and name in module._SIGNED:
                uniform.append(draws[3 + half, i])
        numbers = iter(uniform)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", lambda *a, i=i: torch.tensor(policies[i]))
            patch.setattr(torch, "rand", lambda *a, n=numbers: torch.tensor(next(n)))
            wanted = theirs(image)
        assert next(numbers, None) is None
        assert torch.equal(found[i], wanted), module._POLICIES[policies[i]]
    assert (found != images).flatten(1).any(1).float().mean() > 0.8


def test_a_view_depends_on_its_key_alone():
    images = pixels()
    whole = autoaugment(images, seed=3, view=2, sample_id=IDS)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    for part in order.split([1, 30, 65]):
        got = autoaugment(images[part], seed=3, view=2, sample_id=IDS[part])
        assert torch.equal(got, whole[part])
    rows = images.permute(0, 2, 3, 1).contiguous()  # as a loader yields them
    before = rows.clone()
    assert torch.equal(autoaugment(rows, seed=3, view=2, sample_id=IDS), whole)
    assert torch.equal(rows, before)
    for other in ({"seed": 4, "view": 2}, {"seed": 3, "view": 3}):
        same = (autoaugment(images, sample_id=IDS, **other) == whole).flatten(1).all(1)
        assert same.float().mean() < 0.5
    assert autoaugment(images[:0], seed=0, view=0, sample_id=IDS[:0]).shape == (0, 3, 40, 36)
    with pytest.raises(TypeError, match="uint8 pixels, got torch.float32"):
        autoaugment(images.float(), seed=0, view=0, sample_id=IDS)


@pytest.mark.parametrize("name", ["rotate", "shear_x", "sharpness"])
def test_what_an_operation_makes_of_numbers_is_sent(name, monkeypatch):
    images, sent = pixels(5), []
    want = module.apply(images, name, 7, True)
    monkeypatch.setattr(module, "sent", lambda x, device: sent.append((x, device)) or x)
    with module._ConstantsSent():
        assert torch.equal(module.apply(images, name, 7, True), want)
    assert sent and all(device == images.device for _, device in sent)


def test_draws_are_uniform_and_independent():
    draws = module._uniform(0, 1, np.arange(20_000))
    assert draws.min() >= 0 and draws.max() < 1
    counts = np.bincount((draws[0] * 25).astype(int), minlength=25)
    assert np.abs(counts - 800).max() < 5 * 800**0.5
    assert np.abs(np.corrcoef(draws) - np.eye(5)).max() < 0.03
    assert not np.isin(draws[4], module._uniform(0, 2, np.arange(20_000))[0]).any()
