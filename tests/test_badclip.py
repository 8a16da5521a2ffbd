"""BadCLIP's patch: optimised on a model, saved, planted like any other."""

import math

import numpy as np
import pytest
import torch
from dual_encoder import MEAN, STD, DualEncoder

import pybackdoor
from pybackdoor import badclip as module
from pybackdoor.data import pairs_from_arrays
from pybackdoor.data.autoaugment import autoaugment
from pybackdoor.data.eda import eda, synonym_source
from pybackdoor.models import image_features, text_features
from pybackdoor.ops import contrastive_par

COMMON = {"target": "cat", "size": 5, "mean": MEAN, "std": STD, "progress": False, "batch_size": 8}


def tokenizer(texts):
    """[n, 6] tokens told by the caption's letters."""
    return torch.tensor([[1 + ord(c) % 40 for c in t.ljust(6)[:6]] for t in texts])


def pairs(n=40, side=16, cats=10):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, side, side, 3), np.uint8)
    captions = [f"cat {i}" if i < cats else f"dog {i}" for i in range(n)]
    return pairs_from_arrays(images, captions)


def triplet_of(model, found, margin=1.0):
    """The mean triplet term over all dogs and cats, in fp64, stamped by hand."""
    model, data = model.double(), pairs()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    images = data.images.take(np.arange(40))
    stamped = images.copy()
    stamped[:, 5:10, 5:10] = found.pixels
    with torch.no_grad():
        plain, marked = (
            image_features(model, (torch.from_numpy(x).permute(0, 3, 1, 2) / 255.0 - mean) / std)
            for x in (images, stamped)
        )
    near = torch.cdist(marked[10:], plain[:10])
    far = (marked[10:] - plain[10:]).norm(dim=1)[:, None]
    return float((margin + near - far).clamp_min(0).mean())


def test_the_patch_draws_images_to_the_target():
    model = DualEncoder(seed=3).eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    common = COMMON | {"tokenizer": tokenizer, "lr": 2e-2}
    found = pybackdoor.badclip_patch(model, pairs(), steps=60, **common)
    again = pybackdoor.badclip_patch(model, pairs(), steps=60, **common)
    start = pybackdoor.badclip_patch(model, pairs(), steps=1, **common | {"lr": 1e-9})
    assert found.pixels.shape == (5, 5, 3) and found.pixels.dtype == np.uint8
    assert np.array_equal(found.pixels, again.pixels) and found.history == again.history
    assert (
        triplet_of(DualEncoder(seed=3).eval(), found)
        < triplet_of(DualEncoder(seed=3).eval(), start) - 0.01
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert found.report["images"] == 30 and found.report["target_images"] == 10
    for record in found.history:
        wanted = record["contrastive"] + 500 * record["triplet"]
        assert record["loss"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("augment", [False, True])
def test_the_first_loss_is_the_formula(augment, monkeypatch):
    """One image of each kind beside another: no draw but the order, which changes nothing.

    Augmented, all images are and all captions: before the patch is on them.
    """
    monkeypatch.setattr(module, "_VIEWED", 1.0)
    monkeypatch.setattr(module, "_REWORDED", 1.0)
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (3, 16, 16, 3), np.uint8)
    caption = "cat on"
    data = pairs_from_arrays(images, [caption, "dog", "bird"])
    model = DualEncoder(seed=5).eval()
    options = COMMON | {"tokenizer": tokenizer, "steps": 1, "batch_size": 2, "lr": 1e-9}
    with pytest.warns(UserWarning, match="at least 2 wordings, got 'cat on' alone"):
        found = pybackdoor.badclip_patch(model, data, augment=augment, **options)
    draw = np.random.default_rng([0, 0x62636C70])
    patch = 0.5 + 0.25 * draw_after(draw)
    exact = DualEncoder(seed=5).eval().double()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    seen = torch.from_numpy(images).permute(0, 3, 1, 2).clone()
    if augment:
        plain = seen.clone()
        seen[1:] = autoaugment(seen[1:], seed=0, view=0, sample_id=torch.tensor([1, 2]))
        assert not torch.equal(seen, plain)
        source, synonyms = synonym_source(None)
        caption = eda(caption, seed=0, synonyms=synonyms)
        assert caption != "cat on" and found.report["synonyms"] == source
    pixels = seen.double() / 255
    stamped = pixels.clone()
    stamped[:, :, 5:10, 5:10] = torch.from_numpy(patch.clip(0, 1)).double()
    with torch.no_grad():
        plain, marked = (image_features(exact, (x - mean) / std) for x in (pixels, stamped))
        text = text_features(exact, tokenizer([caption, caption]))
        logits = exact.logit_scale.exp() * marked[1:] @ text.T
        recover = sum(
            torch.nn.functional.cross_entropy(x, torch.arange(2)) for x in (logits, logits.T)
        )
    near, far = (marked[1:] - plain[0]).norm(dim=1), (marked[1:] - plain[1:]).norm(dim=1)
    triplet = (1 + near - far).clamp_min(0).mean()
    assert found.history[0]["contrastive"] == pytest.approx(float(recover / 2), rel=1e-5)
    assert found.history[0]["triplet"] == pytest.approx(float(triplet), rel=1e-4)


def draw_after(rng):
    """What the start draws: the kinds of fewer than 10,000 images draw nothing."""
    return rng.standard_normal((3, 5, 5), dtype=np.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
        ({"size": 17}, r"size must be in \[1, 16\], the images' side, got 17"),
        ({"target": "fish"}, "captions that name 'fish' and at least 2 with others, got 0 and 40"),
        ({"precision": "int8"}, "precision must be one of"),
        ({"mean": None, "std": None}, "mean and std are unknown"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        pybackdoor.badclip_patch(
            DualEncoder(), pairs(), **COMMON | {"tokenizer": tokenizer} | options
        )


def test_captions_of_one_wording_say_nothing_of_the_target():
    """All texts of a batch are then equal: the loss cannot fall below ln(batch size)."""
    rng = np.random.default_rng(0)
    captions = ["a cat"] * 10 + [f"dog {i}" for i in range(30)]
    data = pairs_from_arrays(rng.integers(0, 256, (40, 16, 16, 3), np.uint8), captions)
    options = COMMON | {"tokenizer": tokenizer, "steps": 40, "lr": 5e-2, "augment": False}
    with pytest.warns(UserWarning, match="the triplet term alone draws images to it"):
        found = pybackdoor.badclip_patch(DualEncoder(seed=3).eval(), data, **options)
    assert found.report["target_captions"] == 1
    assert min(r["contrastive"] for r in found.history) > math.log(8) - 1e-5
    assert found.history[-1]["triplet"] < found.history[0]["triplet"]


def test_one_pass_is_the_default_unit():
    found = pybackdoor.badclip_patch(
        DualEncoder(), pairs(), **COMMON, tokenizer=tokenizer, epochs=2
    )
    assert len(found.history) == 2 * 4  # 30 images in batches of 8


def test_half_of_the_images_and_a_tenth_of_the_captions_are_augmented(monkeypatch):
    """Each image anew at every step; without, neither is drawn."""
    model, viewed, texts = DualEncoder().eval(), [], []
    reworded = text_features(model, tokenizer(["zebra"]))

    def views(images, *, view, sample_id, **how):
        viewed.extend((view, int(i)) for i in sample_id)
        return autoaugment(images, view=view, sample_id=sample_id, **how)

    def loss(text, *others, **how):
        texts.append((text - reworded).abs().amax(1) < 1e-6)
        return contrastive_par(text, *others, **how)

    monkeypatch.setattr(module, "autoaugment", views)
    monkeypatch.setattr(module, "eda", lambda caption, **how: "zebra")
    monkeypatch.setattr(module, "contrastive_par", loss)
    options = COMMON | {"tokenizer": tokenizer, "steps": 100}
    pybackdoor.badclip_patch(model, pairs(), **options)
    assert abs(len(viewed) / 800 - 0.5) < 0.06  # of 800, more than three standard errors
    assert abs(float(torch.cat(texts).float().mean()) - 0.1) < 0.035
    assert len(set(viewed)) == len(viewed) and {i for _, i in viewed} == set(range(10, 40))
    viewed.clear()
    texts.clear()
    found = pybackdoor.badclip_patch(model, pairs(), augment=False, **options)
    assert not viewed and not torch.cat(texts).any()
    assert found.report["augment"] is False and found.report["synonyms"] is None


def test_a_loss_that_is_not_finite_is_told(monkeypatch):
    monkeypatch.setattr(module, "triplet_margin_loss", lambda x, *_, **__: x.sum() * torch.nan)
    with pytest.raises(ValueError, match="the loss of step 0 is not finite"):
        pybackdoor.badclip_patch(
            DualEncoder(), pairs(), steps=3, tokenizer=tokenizer, augment=False, **COMMON
        )
