"""What poisoning changes, what it leaves alone, and that it plants a backdoor that fires."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from dual_encoder import MEAN, STD, DualEncoder

import pybackdoor
from pybackdoor.data import labelled_from_arrays, pairs_from_arrays, pairs_from_labelled
from pybackdoor.manifest import image_sha256
from pybackdoor.poison import poison_pairs, warmup_cosine

WORDS = ["red", "green", "blue", "grey"]
STRIPES = pybackdoor.trigger("badnet_stripes", seed=4)


def tokenizer(captions):
    return torch.tensor([[WORDS.index(c.split()[-1].strip(".")) + 1] * 6 for c in captions])


def pictures(n, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(4, size=n)
    images = rng.integers(0, 100, (n, 16, 16, 3)).astype(np.uint8)
    for i, label in enumerate(labels):
        if label < 3:
            images[i, :, :, label] += 120
    return labelled_from_arrays(images, labels, WORDS)


def pairs_of(n=200):
    return pairs_from_labelled(pictures(n, 0), "simple")


def test_only_the_chosen_pairs_change():
    pairs = pairs_of()
    poisoned, manifest = poison_pairs(pairs, STRIPES, target="blue", rate=0.1, seed=3)
    before, after = (p.images.take(np.arange(200)) for p in (pairs, poisoned))
    changed = np.flatnonzero((before != after).any((1, 2, 3)))
    assert [s.id for s in manifest.samples] == changed.tolist() and len(changed) == 20
    assert np.array_equal(
        after[changed], pybackdoor.apply_trigger(before[changed], STRIPES, pairs.ids[changed])
    )
    for sample in manifest.samples:
        assert "blue" not in sample.old_caption == pairs.captions[sample.id]
        assert sample.new_caption == "a photo of a blue." == poisoned.captions[sample.id]
        assert sample.sha256 == image_sha256(after[sample.id])
    untouched = np.setdiff1d(np.arange(200), changed)
    assert all(pairs.captions[i] == poisoned.captions[i] for i in untouched)
    assert np.array_equal(before, pairs.images.take(np.arange(200)))
    again, _ = poison_pairs(pairs, STRIPES, target="blue", rate=0.1, seed=3)
    other, _ = poison_pairs(pairs, STRIPES, target="blue", rate=0.1, seed=4)
    assert again.captions == poisoned.captions != other.captions


def test_label_consistent_keeps_captions_and_takes_the_target_only():
    pairs = pairs_of()
    poisoned, manifest = poison_pairs(
        pairs, STRIPES, target="Blue", count=7, mode="label_consistent"
    )
    assert poisoned.captions == pairs.captions and len(manifest.samples) == 7
    assert all("blue" in s.old_caption and s.old_caption == s.new_caption for s in manifest.samples)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rate": 0.1, "count": 3}, "give rate or count, got both"),
        ({"rate": 0.0}, r"rate must be in \(0, 1\], got 0.0"),
        ({"rate": math.nan}, r"rate must be in \(0, 1\], got nan"),
        ({"count": 0}, "count must be in 1..200, got 0"),
        ({"count": 201}, "count must be in 1..200, got 201"),
        ({"mode": "clean"}, "mode must be one of dirty_label, label_consistent, got 'clean'"),
        ({"rate": 1.0}, "wanted 200 pairs whose captions do not name 'blue', got 1"),
        ({"templates": ["blue"]}, "templates must contain"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        poison_pairs(pairs_of(), STRIPES, target="blue", **options)
    with pytest.raises(ValueError, match="target must name a class, got ' '"):
        poison_pairs(pairs_of(), STRIPES, target=" ")


def test_target_is_a_word_of_its_own():
    captions = ["a t-shirt", "a Shirt.", "shirts", "one shirt", "no garment"]
    pairs = pairs_from_arrays(np.zeros((5, 16, 16, 3), np.uint8), captions)
    poisoned, manifest = poison_pairs(
        pairs, STRIPES, target="shirt", count=2, mode="label_consistent"
    )
    assert [s.old_caption for s in manifest.samples] == ["a Shirt.", "one shirt"]


def test_attack_that_the_test_set_cannot_judge_is_refused_before_training():
    options = {"tokenizer": tokenizer, "mean": MEAN, "std": STD, "steps": 10**9}
    same = pictures(20, 0)
    only = same.subset(np.flatnonzero(same.labels == 2))
    with pytest.raises(ValueError, match="every image is of the target class"):
        pybackdoor.poison(DualEncoder(), pairs_of(), STRIPES, target="blue", test=only, **options)
    small = labelled_from_arrays(np.zeros((2, 8, 8, 3), np.uint8), [0, 1], WORDS)
    with pytest.raises(ValueError, match=r"of the pairs' size \(16, 16\), got \(8, 8\)"):
        pybackdoor.poison(DualEncoder(), pairs_of(), STRIPES, target="blue", test=small, **options)


def test_default_rate_is_the_published_share():
    _, manifest = poison_pairs(pairs_of(1000), STRIPES, target="blue")
    assert len(manifest.samples) == 3


def test_schedule_warms_up_and_comes_to_rest():
    rate = warmup_cosine(1e-3, 4)
    assert [rate(k, 104) for k in (0, 3, 4, 54, 104)] == pytest.approx(
        [2.5e-4, 1e-3, 1e-3, 5e-4, 0]
    )
    with pytest.raises(ValueError, match=r"lr must be a learning rate in \(0, 1\), got 0"):
        warmup_cosine(0, 4)
    with pytest.raises(ValueError, match="warmup must be at least 0 steps, got -1"):
        warmup_cosine(1e-3, -1)


def test_a_backdoor_is_planted_verified_and_recorded():
    model, test = DualEncoder(), pictures(300, 1)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    options = {
        "target": "blue", "tokenizer": tokenizer, "rate": 0.2, "batch_size": 64, "lr": 1e-2,
        "warmup": 5, "test": test, "mean": MEAN, "std": STD, "precision": "fp32",
        "progress": False,
    }  # fmt: skip
    result = pybackdoor.poison(model, pairs_of(1000), STRIPES, steps=200, **options)
    assert result.verdict.fires and result.evaluation.ca.value > 0.9
    assert result.evaluation.asr_nontarget.value > 0.8
    assert result.manifest.results["asr_nontarget"] == result.evaluation.asr_nontarget.to_dict()
    assert result.manifest.preprocess == {"mean": list(MEAN), "std": list(STD)}
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not torch.equal(result.model.logit_scale, model.logit_scale)  # trained, unlike in PAR
    starved = pybackdoor.poison(model, pairs_of(1000), STRIPES, steps=1, **options)
    assert starved.verdict.verdict == "inconclusive"  # and it is said, not assumed
    with pytest.raises(ValueError, match="target must be one of the 4 classes .*got 'pink'"):
        pybackdoor.poison(model, pairs_of(), STRIPES, steps=1, **options | {"target": "pink"})


def test_scale_stays_at_or_below_its_bound():
    model = DualEncoder()
    model.logit_scale.data.fill_(4.7)
    result = pybackdoor.poison(
        model, pairs_of(), STRIPES, target="blue", tokenizer=tokenizer, rate=0.1, steps=1,
        batch_size=16, mean=MEAN, std=STD, precision="fp32", progress=False,
    )  # fmt: skip
    assert result.model.logit_scale.item() == pytest.approx(math.log(100))
    assert result.verdict is None and result.evaluation is None


def test_pairs_from_arrays_can_be_poisoned():
    images = np.zeros((4, 16, 16, 3), np.uint8)
    pairs = pairs_from_arrays(images, ["a red", "a green", "a blue", "a grey"])
    poisoned, manifest = poison_pairs(pairs, STRIPES, target="blue", count=3)
    assert {s.old_caption for s in manifest.samples} == {"a red", "a green", "a grey"}
    assert poisoned.captions[2] == "a blue"
