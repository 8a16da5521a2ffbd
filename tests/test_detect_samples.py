"""detect_samples: what is scored, in which order, for which sources, and what it is judged by."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from data_files import cut, image_table
from dual_encoder import MEAN, STD, DualEncoder

import pybackdoor
from pybackdoor.data import PairLoader, pairs_from_arrays, pairs_from_csv
from pybackdoor.detect import METHODS, DetectionResult, detect_samples, nearest, planted
from pybackdoor.detect.samples import suited
from pybackdoor.features import FeatureReader
from pybackdoor.manifest import image_sha256
from pybackdoor.poison import poison_pairs

WORDS = ["red", "green", "blue", "grey"]
NORM = {"mean": MEAN, "std": STD}


def tokenizer(captions):
    return torch.tensor([[WORDS.index(c.split()[-1].strip(".")) + 1] * 6 for c in captions])


def random_pairs(n=60, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 16, 16, 3), np.uint8)
    return pairs_from_arrays(images, [f"a {WORDS[i % 4]}" for i in range(n)])


def detect(pairs, model=None, **options):
    options = {"tokenizer": tokenizer, "progress": False} | NORM | options
    return detect_samples(DualEncoder() if model is None else model, pairs, **options)


def features_of(pairs, model):
    reader = FeatureReader(model, tokenizer, **NORM)
    return reader.images(pairs.images, pairs.ids), reader.captions(pairs.captions)


@pytest.mark.parametrize("method", ["dao", "slof", "lid", "k_dist"])
def test_neighbours_among_all(method):
    pairs, model = random_pairs(), DualEncoder().train()
    found = detect(pairs, model, method=method, reference=0, k=4, batch_size=7)
    assert model.training  # left as it was
    images, _ = features_of(pairs, model)
    wanted = METHODS[method].function(nearest(images, 4))
    np.testing.assert_allclose(found.scores, wanted, rtol=1e-4, atol=1e-5)
    assert found.settings == {"k": 4, "reference": 0, "seed": 0, "precision": "fp32"}
    assert found.scores.dtype == np.float64 and np.array_equal(found.ids, pairs.ids)


def test_settings_of_numpy_s_integers_are_json():
    pairs = random_pairs()
    given = {"k": np.int64(4), "reference": np.int32(20), "seed": np.uint8(3)}
    found = detect(pairs, **given)
    wanted = {"k": 4, "reference": 20, "seed": 3, "precision": "fp32"}
    assert json.loads(json.dumps(found.settings)) == wanted
    assert np.array_equal(found.scores, detect(pairs, k=4, reference=20, seed=3).scores)


def test_neighbours_among_parts_of_the_pairs():
    """Each pair is scored within a random part: a permutation cut into parts of at least 20."""
    pairs, model = random_pairs(65), DualEncoder()
    found = detect(pairs, model, method="k_dist", reference=20, k=3, seed=5)
    images, _ = features_of(pairs, model)
    order = np.random.default_rng([5, 0x6E656172]).permutation(65)
    for part in np.array_split(order, 3):
        wanted = METHODS["k_dist"].function(nearest(images[part], 3))
        np.testing.assert_allclose(found.scores[part], wanted, rtol=1e-4)
    again = detect(pairs, model, method="k_dist", reference=20, k=3, seed=5)
    other = detect(pairs, model, method="k_dist", reference=20, k=3, seed=6)
    assert np.array_equal(found.scores, again.scores)
    assert not np.array_equal(found.scores, other.scores)
    whole = detect(pairs, model, method="k_dist", k=3)  # fewer pairs than the default part
    among_all = detect(pairs, model, method="k_dist", k=3, reference=0)
    assert np.array_equal(whole.scores, among_all.scores)


def test_cosines_and_gain():
    pairs, one, two = random_pairs(), DualEncoder(0), DualEncoder(1)
    cosines = []
    for model in (one, two):
        images, texts = features_of(pairs, model)
        cosines.append((images.double() * texts.double()).sum(1).numpy())
    near = {"rtol": 0, "atol": 1e-6}
    np.testing.assert_allclose(detect(pairs, one, method="high_cosine").scores, cosines[0], **near)
    np.testing.assert_allclose(detect(pairs, one, method="low_cosine").scores, -cosines[0], **near)
    gain = detect(pairs, one, method="gain", overfit=two, batch_size=11)
    np.testing.assert_allclose(gain.scores, cosines[1] - cosines[0], **near)
    gmm = detect(pairs, one, method="gmm").scores
    np.testing.assert_allclose(gmm, METHODS["gmm"].function(cosines[0]), atol=1e-3)


def test_captions_are_encoded_once_while_they_are_remembered(monkeypatch):
    from pybackdoor.detect import reading

    calls = []

    def counting(captions):
        calls.extend(captions)
        return tokenizer(captions)

    pairs = random_pairs()
    first = detect(pairs, method="low_cosine", tokenizer=counting, batch_size=8)
    assert sorted(calls) == sorted(f"a {word}" for word in WORDS)
    monkeypatch.setattr(reading, "_CAPTIONS", 7)  # forgotten before each batch
    calls.clear()
    again = detect(pairs, method="low_cosine", tokenizer=counting, batch_size=8)
    assert len(calls) == 4 * 8 and np.allclose(first.scores, again.scores, atol=1e-6)


@pytest.mark.parametrize("method", ["dao", "low_cosine"])
def test_loaders_give_the_same_scores(method):
    pairs, model = random_pairs(), DualEncoder()
    wanted = detect(pairs, model, method=method)
    shuffled = PairLoader(pairs, tokenizer, batch_size=16, seed=3)
    found = detect(shuffled, model, method=method, tokenizer=None)  # its pairs, in their order
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-4, atol=1e-6)
    pixels, tokens = pairs.images.take(np.arange(60)), tokenizer(pairs.captions)
    norm = (torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1))
    floats = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - norm[0]) / norm[1]
    batches = [slice(0, 25), slice(25, 60)]
    ids = torch.arange(60) + 100
    without = {"mean": None, "std": None}
    for source, given in (
        ([(pixels[s], tokens[s], ids[s]) for s in batches], NORM),
        ([{"images": floats[s], "tokens": tokens[s]} for s in batches], without),
    ):
        found = detect(iter(source), model, method=method, tokenizer=None, **given)
        np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-3, atol=1e-5)
    assert found.ids.tolist() == list(range(60))
    with_ids = detect([(pixels, tokens, ids)], model, method=method)
    assert with_ids.ids.tolist() == ids.tolist()


def test_broken_images_have_no_score_and_are_in_the_ledger(tmp_path):
    table = image_table(tmp_path, 30)
    table.write_text(re.sub(r"caption \d+", "a grey", table.read_text()))
    for broken in (4, 17):
        cut(tmp_path / f"{broken}.png")
    options = {"image_size": 16, "resize_mode": "squash", "cache_dir": tmp_path / "cache"}
    pairs = pairs_from_csv(table, max_bad=0.1, **options)
    found = detect(pairs, k=3, batch_size=5)
    assert sorted(found.broken) == [4, 17] and np.isnan(found.scores[[4, 17]]).all()
    assert [bad.row for bad in pairs.ledger.rows] == [4, 17] and len(found.order) == 28
    assert not {4, 17} & set(found.order.tolist()) | set(found.keep(share=1.0).tolist()) & {4, 17}
    assert not {4, 17} & set(found.keep(threshold=np.inf).tolist())
    clean = pairs.subset(np.setdiff1d(np.arange(30), [4, 17]))
    wanted = detect(clean, k=3).scores
    np.testing.assert_allclose(found.scores[~np.isnan(found.scores)], wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="at least 2 of 30 rows cannot be used"):
        detect(pairs_from_csv(table, max_bad=0.04, **options), k=3)
    with pytest.raises(ValueError, match="wanted pairs that can be used, got none of 2"):
        detect(pairs.subset(np.array([4, 17])), k=1)


def result(scores, truth=None):
    scores = np.array(scores, float)
    return DetectionResult(scores, np.arange(len(scores)) + 10, "dao", {}, truth=truth)


def test_order_top_and_keep():
    found = result([0.5, 2.0, np.nan, 0.5, 3.0, -1.0])
    assert found.order.tolist() == [4, 1, 0, 3, 5] and len(found) == 6
    assert found.top(3).tolist() == [4, 1, 0] and found.top(0).tolist() == []
    assert found.keep(share=0.6).tolist() == [0, 3, 5]
    assert found.keep(share=0.4).tolist() == [3, 5]  # of equal scores the first is worse
    assert found.keep(threshold=0.5).tolist() == [0, 3, 5]
    for k in (-1, 6):
        with pytest.raises(ValueError, match=rf"k must be in \[0, 5\].*got {k}"):
            found.top(k)
    for options, message in (
        ({}, "got neither"), ({"share": 0.5, "threshold": 1.0}, "got both"),
        ({"share": 0.0}, r"share must be in \(0, 1\], got 0"), ({"threshold": np.nan}, "got nan"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            found.keep(**options)
    with pytest.raises(ValueError, match="wanted a result with truth"):
        found.measures()


def test_measures_leave_out_pairs_without_a_score():
    truth = np.array([True, False, True, False, True, False])
    found = result([0.5, 2.0, np.nan, 0.5, 3.0, -1.0], truth).measures([1, 3])
    assert found["scored"] == 5 and found["planted"] == 2
    assert found["auroc"] == pytest.approx((3 + 0 + 0.5 + 1) / 6)
    assert found["at"] == [
        {"k": 1, "precision": 1.0, "recall": 0.5},
        {"k": 3, "precision": pytest.approx(0.5), "recall": pytest.approx(0.75)},
    ]
    assert [at["k"] for at in result([1, 2, 3, 4, 5, 6], truth).measures()["at"]] == [3]


def test_planted_poison_is_put_in_again_and_found():
    """A trigger far from all else: every one of the few poisoned pairs ranks first."""
    rng = np.random.default_rng(0)
    grey = rng.integers(118, 138, (300, 16, 16, 3)).astype(np.uint8)
    pairs = pairs_from_arrays(grey, [f"a {WORDS[i % 4]}" for i in range(300)])
    spec = pybackdoor.trigger("checkerboard", size=8)
    poisoned, manifest = poison_pairs(pairs, spec, target="blue", templates=["a {}"], count=6)
    again, truth = planted(pairs, manifest)
    assert again.captions == poisoned.captions and truth.sum() == 6
    rows = np.arange(300)
    assert np.array_equal(again.images.take(rows), poisoned.images.take(rows))
    assert [image_sha256(again.images.take([row])[0]) for row in np.flatnonzero(truth)] == [
        sample.sha256 for sample in manifest.samples
    ]
    same, as_before = planted(poisoned, manifest)
    assert same is poisoned and np.array_equal(as_before, truth)
    found = detect(again, truth=truth, k=16).measures()
    assert found["planted"] == 6 and found["auroc"] > 0.99
    assert found["at"] == [{"k": 6, "precision": 1.0, "recall": 1.0}]
    part, some = planted(pairs.subset(np.flatnonzero(truth)[:2]), manifest)
    assert len(part) == 2 and some.all()
    with pytest.raises(ValueError, match="none of the manifest's 6 samples is among the 1 pairs"):
        planted(pairs.subset(np.flatnonzero(~truth)[:1]), manifest)
    other = pairs_from_arrays(255 - grey, pairs.captions)
    with pytest.raises(
        ValueError, match="must be the one that the manifest's sample .* got another"
    ):
        planted(other, manifest)
    large = pairs_from_arrays(np.zeros((2, 32, 32, 3), np.uint8), ["a red", "a blue"])
    with pytest.raises(ValueError, match=r"manifest's size \(16, 16\), got \(32, 32\)"):
        planted(large, manifest)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "doa"}, "got 'doa' .did you mean 'dao'"),
        ({"method": "gmm", "k": 3}, "k is for methods of neighbours and fragility, got it with"),
        ({"method": "gmm", "reference": 0}, "reference is for methods of neighbours"),
        ({"k": 0}, "k must be an integer of at least 1 for dao, got 0"),
        ({"k": 3.5}, "k must be an integer of at least 1 for dao, got 3.5"),
        ({"k": 60}, "k must be below the number of pairs with an image, 60, got 60"),
        ({"reference": 16}, "reference must be 0, for all pairs, or above k = 16.*got 16"),
        ({"reference": -1}, "reference must be 0.*got -1"),
        ({"reference": 256.0}, "reference must be an integer for dao, got 256.0"),
        ({"reference": False}, "reference must be an integer for dao, got False"),
        ({"seed": 1.5}, "seed must be an integer for dao, got 1.5"),
        ({"method": "gain"}, "overfit.* is for gain alone, got none"),
        ({"overfit": DualEncoder()}, "overfit.* is for gain alone, got it with 'dao'"),
        ({"method": "gmm", "tokenizer": None}, "tokenizer is needed: gmm compares"),
        ({"truth": np.zeros(59, bool)}, r"truth must be \[60\] bool.*got bool \[59\]"),
        ({"truth": np.zeros(60)}, r"truth must be \[60\] bool.*got float64"),
        ({"mean": None, "std": None}, "mean and std are unknown"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"precision": "fp8"}, "precision must be one of"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        detect(random_pairs(), **options)


def test_an_empty_loader_and_broken_features_are_refused():
    with pytest.raises(ValueError, match="wanted pairs that can be used, got none of 0"):
        detect([])
    model = DualEncoder()
    model.image[-1].bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="image features of 60 of 60 are not finite"):
        detect(random_pairs(), model)


def test_the_method_follows_the_captions_where_none_is_named(monkeypatch):
    monkeypatch.setattr("pybackdoor.detect.samples.SOUGHT", 6)  # as many pairs as are enough
    images = np.zeros((24, 8, 8, 3), np.uint8)
    own = pairs_from_arrays(images, [f"a thing number {i}" for i in range(24)])
    shared = pairs_from_arrays(images, [f"a {WORDS[i % 4]}" for i in range(24)])
    halves = pairs_from_arrays(images, [f"a photo of {i // 2}" for i in range(24)])
    most = pairs_from_arrays(images, [f"a photo of {min(i, 12)}" for i in range(24)])  # 13 of 24
    assert [suited(p) for p in (own, shared, halves, most)] == ["dao", *["fragility"] * 2, "dao"]
    assert suited(shared.subset(range(23))) == "dao" and suited([(images, None)]) == "dao"
    assert detect(shared, k=5).method == "dao" and detect(shared, reference=20).method == "dao"
    with pytest.raises(ValueError, match="fragility needs at least 512 pairs"):
        detect(shared)  # is what was chosen
