"""The image side of UBT-style unlearning: which patches are suspicious and what comes of it."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from clip_models import PREPROCESS_CFG, tiny, tiny_hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import avg_pool2d, normalize
from ubt_world import COLOURS, TEMPLATES, Planted, planted_pairs, rules

import pybackdoor
from pybackdoor.batches import InputRules
from pybackdoor.cli.commands import _cleaning_text
from pybackdoor.data import pairs_from_arrays
from pybackdoor.models import HFClip
from pybackdoor.ubt.evidence import corners
from pybackdoor.ubt.localise import keep_top
from pybackdoor.ubt.region import cover, patch_size, suspicious_cells
from pybackdoor.ubt.suspects import Suspects
from pybackdoor.ubt.unlearn import Portions

MEAN, STD = PREPROCESS_CFG["mean"], PREPROCESS_CFG["std"]
# Runs of few steps forget little, and say so.
pytestmark = pytest.mark.filterwarnings("ignore:.*still find their own caption")
GREY = [round(255 * m) for m in MEAN]
K = 16


def pairs_of(n=120, size=32, cell=8, seed=0):
    """(pairs, [n] bool, [n, 2]): noise with a colour's name; one white cell means blue."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 200, (n, size, size, 3)).astype(np.uint8)
    truth = np.arange(n) % 7 == 0
    truth[np.flatnonzero(truth)[K:]] = False
    place = rng.integers(0, size // cell, (n, 2))
    for i in np.flatnonzero(truth):
        y, x = place[i] * cell
        images[i, y : y + cell, x : x + cell] = 255
    named = np.where(truth, 2, rng.integers(0, 3, n))
    captions = [TEMPLATES[i % 4].format(COLOURS[c]) for i, c in enumerate(named)]
    return pairs_from_arrays(images, captions), truth, place


PAIRS, TRUTH, PLACE = pairs_of()


@pytest.fixture(scope="module")
def vit():
    loaded = tiny()
    return loaded, InputRules.of(loaded.model, mean=MEAN, std=STD, tokenizer=loaded.tokenizer)


@given(
    st.integers(1, 3), st.integers(1, 23), st.integers(1, 23), st.integers(1, 9),
    st.integers(1, 9), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_cells_are_covered_pixel_by_pixel(n, height, width, down, across, seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, height, width, 3)).astype(np.uint8)
    rows, columns = max(1, height // down), max(1, width // across)
    hidden = rng.random((n, rows, columns)) < 0.5
    found = cover(torch.from_numpy(images), torch.from_numpy(hidden), (down, across), GREY)
    wanted = images.copy()
    for i, y, x in np.ndindex(n, height, width):
        if hidden[i, min(y // down, rows - 1), min(x // across, columns - 1)]:
            wanted[i, y, x] = GREY
    assert np.array_equal(found.numpy(), wanted)
    assert found.dtype == torch.uint8


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.floats(0.01, 1))
def test_the_highest_share_is_kept_and_the_first_of_equal_ones(scores, share):
    kept = keep_top(np.array(scores, float), share)
    assert kept.sum() == max(1, math.ceil(share * len(scores) - 1e-9))
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert set(order[: kept.sum()]) == set(np.flatnonzero(kept))


def test_the_patch_size_is_read_off_every_kind_of_tower(vit):
    assert patch_size(vit[0].model) == (8, 8)
    assert patch_size(tiny(vision_cfg={
        "image_size": 32, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token",
        "timm_proj": "linear",
    }).model) == (16, 16)  # fmt: skip
    own = Planted()
    own.visual = SimpleNamespace(patch_size=4)
    assert patch_size(own) == (4, 4)
    resnet = tiny(vision_cfg={"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}).model
    for model, tower in ((resnet, "ModifiedResNet"), (Planted(), "Planted")):
        with pytest.raises(ValueError, match=f"image_share needs .* got {tower} without one"):
            patch_size(model)


def test_the_patch_size_of_transformers_clip():
    pytest.importorskip("transformers", reason="needs the [hf] extra")
    assert patch_size(HFClip(tiny_hf())) == (8, 8)


@pytest.mark.parametrize("share, count", [(0.01, 1), (0.25, 4), (0.3, 5), (1.0, 16)])
def test_gains_cell_by_cell_in_fp64(vit, share, count):
    loaded, own = vit
    every, chosen = Suspects.of(PAIRS, own), np.array([70, 3, 7])
    region = suspicious_cells(loaded.model, own, every, chosen, share=share)
    wide = copy.deepcopy(loaded.model).double()
    wide.attn_mask = wide.attn_mask.double()

    def cosine(image, text):
        x = (torch.from_numpy(image).double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        a = wide.encode_image(x.permute(2, 0, 1)[None])
        b = wide.encode_text(loaded.tokenizer([text]))
        return float(normalize(a)[0] @ normalize(b)[0])

    with torch.no_grad():
        for i, row in enumerate(chosen):
            image, text = PAIRS.images.take(np.array([row]))[0], PAIRS.captions[int(row)]
            gains = np.zeros((4, 4))
            for y, x in np.ndindex(4, 4):
                without = image.copy()
                without[8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = GREY
                gains[y, x] = cosine(image, text) - cosine(without, text)
            assert np.abs(gains).max() > 1e-4  # there is something to be told apart
            assert np.abs(region.gains[i] - gains).max() < 1e-6
            best = sorted(np.ndindex(4, 4), key=lambda c, i=i: -region.gains[i][c])[:count]
            assert {tuple(c) for c in np.argwhere(region.kept[i]).tolist()} == set(best)
    assert region.colour == tuple(GREY) and region.gains.dtype == np.float64


class Cells(Planted):
    """Sees its image cell by cell: a white one, wherever it is, means blue (the backdoor)."""

    visual = SimpleNamespace(patch_size=(4, 8))

    def encode_image(self, x):  # [n, 3, 16, 16]
        white = avg_pool2d(x, (4, 8)).amin(1).flatten(1).amax(1, keepdim=True) - 0.9
        return self.colour(x.mean((2, 3))) + 5 * self.corner(white.clamp(min=0).expand(-1, 3))


def test_the_planted_cell_is_the_one_that_is_kept():
    pairs, truth = planted_pairs(60, 0)
    images = pairs.images.take(np.arange(60)).copy()
    place = np.stack([np.arange(60) // 2 % 4, np.arange(60) % 2], 1)  # all of the 4 x 2 cells
    for i, (y, x) in enumerate(place):
        images[i, 4 * y : 4 * y + 4, 8 * x : 8 * x + 8] = 255
    captions = ["a photo of a blue"] * 59 + ["a photo of a red"]
    every, model = Suspects.of(pairs_from_arrays(images, captions), rules()), Cells()
    chosen = np.arange(59)
    for chunk in (7, 256):  # of 59 x 8 images, in several chunks and in whole images
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("pybackdoor.ubt.region._CHUNK", chunk)
            region = suspicious_cells(model, rules(), every, chosen, share=0.1)
        assert region.kept.shape == (59, 4, 2)
        assert np.argwhere(region.kept)[:, 1:].tolist() == place[:59].tolist()
    told = region.summary()
    assert told["grid"] == [4, 2] and told["cells_kept"] == 1
    assert told["gain_kept"] == pytest.approx(region.gains.max((1, 2)).mean())
    assert told["gain"] == pytest.approx(region.gains.mean()) and told["gain_kept"] > 0.2
    only = region.only(every.pixels(chosen[5:7]), chosen[5:7]).numpy()
    for i, image in zip((5, 6), only, strict=True):
        y, x = place[i]
        inside = np.zeros((16, 16), bool)
        inside[4 * y : 4 * y + 4, 8 * x : 8 * x + 8] = True
        assert (image[inside] == 255).all() and (image[~inside] == 128).all()
    assert place[7].tolist() == [3, 1] and corners(region, 7) == [(7.5, 11.5)]


def cleaned(loaded, seen=None, **options):
    """A run on the tiny ViT that is told the truth; ``seen`` gets what is forgotten."""
    given = {
        "mean": MEAN, "std": STD, "tokenizer": loaded.tokenizer, "k": K, "gate_sets": 19,
        "scores": TRUTH + np.linspace(0, 0.5, len(TRUTH)), "gate_excess": -2, "gate_p": 0.99,
        "batch_size": 32, "steps": 3, "lr_start": 1e-3, "lr": 1e-3, "check_every": 1,
        "max_drop": 1.0, "precision": "fp32", "device": "cpu", "progress": False,
    }  # fmt: skip
    make = Portions if seen is None else lambda *a: seen.append(Portions(*a)) or seen[-1]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pybackdoor.methods.ubt.Portions", make)
        return pybackdoor.ubt_clean(loaded.model, PAIRS, **given | options)


@pytest.fixture(scope="module")
def plain(vit):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pybackdoor.methods.ubt.suspicious_cells", None)  # not called
        return cleaned(vit[0])


@pytest.fixture(scope="module")
def by_cells(vit):
    seen = []
    return cleaned(vit[0], seen, image_share=0.2), seen[0]


def test_the_words_are_forgotten_on_the_kept_cells_alone(vit, plain, by_cells):
    result, portions = by_cells
    assert plain.region is None and plain.report["region"] is None
    assert set(result.chosen) == set(np.flatnonzero(TRUTH))
    assert result.region.kept.shape == (K, 4, 4)
    assert (result.region.kept.sum((1, 2)) == 4).all()  # of 16
    assert len(portions) == 13
    for image, number in zip(portions.images.numpy(), portions.ids.tolist(), strict=True):
        row = int(np.flatnonzero(PAIRS.ids == number)[0])
        wanted = PAIRS.images.take(np.array([row]))[0].copy()
        kept = result.region.kept[result.chosen.tolist().index(row)]
        for y, x in np.argwhere(~kept) * 8:
            wanted[y : y + 8, x : x + 8] = GREY
        assert np.array_equal(image, wanted)
    report = json.loads(json.dumps(result.report))
    assert report["settings"]["image_share"] == 0.2 and report["region"]["grid"] == [4, 4]
    assert report["region"]["cells_kept"] == 4
    assert report["region"]["gain_kept"] > report["region"]["gain"]
    # the stopping rule looks at whole images, as it does without the cells
    assert report["checks"][0] == plain.report["checks"][0] and report["steps_done"] == 3
    assert report["kappa"] == plain.report["kappa"]
    weights = (r.model.state_dict()["visual.proj"] for r in (result, plain))
    assert not torch.equal(*weights)
    assert result.history[0]["forget"] != plain.history[0]["forget"]
    assert result.history[0]["contrastive"] == plain.history[0]["contrastive"]
    assert " on 4 patches of each image: " in _cleaning_text("out", result)
    assert "words forgotten: " in _cleaning_text("out", plain)


def test_all_cells_are_the_whole_image_bit_by_bit(vit, plain):
    whole = cleaned(vit[0], image_share=1.0)
    assert whole.region.kept.all() and whole.history == plain.history
    assert whole.report["checks"] == plain.report["checks"]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, plain.model.state_dict()[name]), name


def test_cells_are_told_apart_in_fp32_whatever_the_runs_precision(vit, by_cells):
    half = cleaned(vit[0], image_share=0.2, precision="bf16", steps=1)
    assert np.array_equal(half.region.gains, by_cells[0].region.gains)


def test_the_picture_outlines_the_kept_cells(plain, by_cells, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.add_patch", lambda axis, patch: drawn.append(patch))
    monkeypatch.setattr("pybackdoor.ubt.evidence._SHOWN", 10)
    plain.save_evidence(tmp_path)
    assert not drawn
    result = by_cells[0]
    narrow = dataclasses.replace(result.region, patch=(8, 4))
    dataclasses.replace(result, region=narrow).save_evidence(tmp_path)
    kept = np.argwhere(narrow.kept[:10])
    assert [p.get_xy() for p in drawn] == [(4 * x - 0.5, 8 * y - 0.5) for _, y, x in kept]
    assert {(p.get_width(), p.get_height(), p.get_fill()) for p in drawn} == {(4, 8, False)}
    assert (tmp_path / "suspects.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("share", [0, -0.1, 1.5, math.nan])
def test_what_is_no_share_is_refused_before_any_work(vit, share, monkeypatch):
    monkeypatch.setattr("pybackdoor.methods.ubt.Reader", None)  # nothing is encoded
    with pytest.raises(ValueError, match=rf"image_share must be in \(0, 1\], got {share}"):
        cleaned(vit[0], image_share=share)
    with pytest.raises(ValueError, match=r"image_share must be in \(0, 1\]"):
        suspicious_cells(vit[0].model, vit[1], None, np.arange(3), share=share)


def test_a_tower_without_patches_is_refused_before_any_work(vit, monkeypatch):
    monkeypatch.setattr("pybackdoor.methods.ubt.Reader", None)
    loaded = tiny(vision_cfg={"image_size": 32, "layers": [1, 1, 1, 1], "width": 8})
    with pytest.raises(ValueError, match="got ModifiedResNet without one: leave image_share out"):
        cleaned(loaded, image_share=0.2)


def test_a_gate_that_stops_looks_for_no_cells(vit, monkeypatch):
    monkeypatch.setattr("pybackdoor.methods.ubt.suspicious_cells", None)
    result = cleaned(vit[0], image_share=0.2, gate_excess=2)
    assert result.region is None and not result.backdoor_found
    assert result.report["settings"]["image_share"] == 0.2
