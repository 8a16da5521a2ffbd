"""Drift repair: its rotation against an fp64 SVD, and its fold in every kind of tower."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from clip_models import tiny
from dual_encoder import MEAN, STD, DualEncoder, random_pairs
from repair_cases import (
    KINDS,
    OPEN_CLIP,
    PAIRS,
    TEXT,
    Shared,
    Unfoldable,
    batches_for,
    drifted,
    features,
    judged,
    make,
    same,
    turn,
    weights,
    worth,
)
from torch import nn

import pybackdoor
from pybackdoor.models import HFClip
from pybackdoor.models.fold import Fold, LinearMap


@pytest.mark.parametrize("kind", KINDS)
def test_logits_stay_and_embeddings_follow_one_rotation(kind):
    old = make(kind)
    new, batches = drifted(old), batches_for(old)
    before = weights(new)
    mended = pybackdoor.repair_drift(new, old, batches, device="cpu")
    assert all(torch.equal(t, before[n]) for n, t in new.state_dict().items())
    moved, origin, found = (features(m, batches) for m in (new, old, mended.model))
    scale = math.exp(new.logit_scale.item())
    logits = [scale * f[0] @ f[1].T for f in (moved, found)]
    assert (logits[0] - logits[1]).abs().max() < 1e-5
    u, _, vt = torch.linalg.svd(moved.flatten(0, 1).T @ found.flatten(0, 1))
    assert (moved @ u @ vt - found).abs().max() < 1e-5  # for one orthogonal matrix
    held_out = torch.arange(PAIRS) % 5 == 0
    fit = [rows[:, ~held_out].flatten(0, 1).numpy() for rows in (moved, origin)]
    u, _, vt = np.linalg.svd(fit[0].T @ fit[1])
    nearest = moved @ torch.from_numpy(u @ vt)
    figures = {
        what: judged(rows[:, held_out], origin[:, held_out], scale)
        for what, rows in (("before", moved), ("after", found), ("nearest", nearest))
    }
    report = mended.report
    for when in ("before", "after") if report["done"] else ("before",):
        for name, value in figures[when].items():
            assert report[f"{name}_{when}"] == pytest.approx(value, abs=1e-4)
    best = min(("before", "nearest"), key=lambda what: worth(figures[what]))
    assert worth(figures["after"]) <= worth(figures[best]) + 1e-5
    assert report["done"] == (worth(figures["after"]) < worth(figures["before"]) - 1e-8)
    assert report["pairs"] == PAIRS and report["held_out"] == 12
    assert report["rank"] == found.shape[2] and report["left_out"] == 0
    assert report.get("error", 0) < 1e-5


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_rotated_copy_is_turned_back(mirrored):
    old = make("ViT")
    new, rotation = copy.deepcopy(old), turn(32)
    if mirrored == (torch.linalg.det(rotation) > 0):
        rotation[:, 0] *= -1
    with torch.no_grad():
        for p in (new.visual.proj, new.text_projection):
            p.copy_(p.double() @ rotation)
    mended = pybackdoor.repair_drift(new, old, batches_for(old), device="cpu")
    assert mended.report["image_before"] > 1 > 1e-10 > mended.report["image_after"]
    for name, wanted in old.state_dict().items():
        torch.testing.assert_close(mended.model.state_dict()[name], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["ResNet", "Hugging Face"])
def test_a_saved_model_keeps_its_rotation(kind, tmp_path):
    old = make(kind)
    batches = batches_for(old)
    mended = pybackdoor.repair_drift(drifted(old), old, batches, device="cpu").model
    if kind == "Hugging Face":
        from transformers import CLIPModel

        pybackdoor.save(mended, tmp_path / "m")
        again = HFClip(CLIPModel.from_pretrained(tmp_path / "m")).eval()
    else:
        config = tiny(0, text_cfg=TEXT, **OPEN_CLIP[kind]).config
        pybackdoor.save(mended, tmp_path / "m", config=config)
        again = pybackdoor.load(tmp_path / "m").model.eval()
    saved, kept = again.state_dict(), mended.state_dict()
    assert all(torch.equal(saved[name], kept[name]) for name in kept.keys() | saved.keys())
    # Not to the bit: a product's sums may depend on where its factors lie in memory.
    torch.testing.assert_close(
        features(again, batches), features(mended, batches), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_rotated_in_fp64_and_rounded_once(dtype):
    rotation = turn(4)
    matrix, bias = torch.randn(4, 6).to(dtype), torch.randn(4).to(dtype)
    linear = LinearMap(nn.Parameter(matrix.clone()), nn.Parameter(bias.clone()), True)
    linear.rotate_(rotation)
    assert torch.equal(linear.weight, (rotation.T @ matrix.double()).to(dtype))
    assert torch.equal(linear.bias, (bias.double() @ rotation).to(dtype))
    old = make("ViT").to(dtype)
    mended = pybackdoor.repair_drift(drifted(old), old, batches_for(old), device="cpu")
    assert mended.report["done"] and mended.model.visual.proj.dtype == dtype
    assert mended.report["error"] < {torch.float64: 1e-13}.get(dtype, 0.05)


def test_fewer_pairs_than_dimensions_turn_what_they_show():
    old = make("ViT")
    new, rotation = copy.deepcopy(old), turn(32)
    Fold(new, *batches_for(old)[0]).rotate_(rotation)
    few = batches_for(old, 10)
    mended = pybackdoor.repair_drift(new, old, few, device="cpu")
    assert mended.report["rank"] == 16  # 8 pairs for the fit
    fitted = torch.arange(10) % 5 != 0
    apart = features(mended.model, few) - features(old, few)
    assert apart[:, fitted].abs().max() < 1e-5


@pytest.mark.parametrize("crossed", [False, True])
def test_what_the_towers_share_is_rotated_once_or_not_at_all(crossed):
    old = Shared(crossed).eval()
    new = drifted(old)
    before = weights(new)
    if not crossed:
        assert pybackdoor.repair_drift(new, old, batches_for(old), device="cpu").report["done"]
        return
    fold = Fold(new, *batches_for(old)[0])
    with pytest.raises(ValueError, match="do not follow the rotation of both towers .they miss it"):
        fold.rotate_(turn(8))
    assert all(torch.equal(t, before[n]) for n, t in new.state_dict().items())


def test_a_tower_without_a_last_map_is_left_alone_and_says_so():
    model, batches = Unfoldable().eval(), batches_for(DualEncoder())
    with pytest.raises(ValueError, match="the text tower ends in no linear map that could take up"):
        pybackdoor.repair_drift(drifted(model), model, batches, device="cpu")
    options = {"steps": 2, "precision": "fp32", "progress": False, "lr": 1e-2, "device": "cpu"}
    with pytest.warns(UserWarning, match="drift is not repaired: the text tower ends in no linear"):
        result = pybackdoor.par_clean(model, batches, **options)
    assert not result.report["repair"]["done"]
    assert "no linear map" in result.report["repair"]["reason"]
    assert same(result.model, pybackdoor.par_clean(model, batches, repair=False, **options).model)


class Constant(DualEncoder):
    """Images are told by no weight."""

    def encode_image(self, x):
        return x[:, 0, 0, :8]


def test_a_tower_without_weights_is_named():
    model = Constant().eval()
    with pytest.raises(ValueError, match="the image tower ends in no linear map"):
        pybackdoor.repair_drift(model, model, batches_for(model), device="cpu")


def test_a_model_that_has_not_moved_is_not_rotated():
    model = make("ViT")
    mended = pybackdoor.repair_drift(model, model, batches_for(model), device="cpu")
    assert (
        not mended.report["done"] and "serves the pairs held out better" in mended.report["reason"]
    )
    assert same(mended.model, model)


def test_bad_arguments_are_named():
    model, batches = DualEncoder(), random_pairs(20, 20)

    def run(reference=model, **options):
        options = {"mean": MEAN, "std": STD, "device": "cpu"} | options
        return pybackdoor.repair_drift(model, reference, batches, **options)

    for pairs in (1, True, 2.5):
        with pytest.raises(
            ValueError, match=f"pairs must be an integer of at least 2, got {pairs}"
        ):
            run(pairs=pairs)
    with pytest.raises(TypeError, match="must have encode_image"):
        run(nn.Linear(2, 2))
    broken = DualEncoder()
    broken.text[1].bias.data[0] = math.nan
    with pytest.raises(ValueError, match="weights of reference must be finite"):
        run(broken)
    wide = DualEncoder()
    wide.image[6], wide.text[1] = nn.Linear(128, 9), nn.Linear(8, 9)
    with pytest.raises(ValueError, match="reference must embed in 8 dimensions .*got 9"):
        run(wide)
