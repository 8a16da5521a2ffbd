"""detect_samples by fragility: which pairs it scores, which word and how many it finds."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from data_files import cut, image_table
from torch.nn import functional as F
from ubt_world import COLOURS, MEAN, STD, WORDS, Planted, WordTokenizer, planted_pairs

from pybackdoor.data import PairLoader, pairs_from_csv
from pybackdoor.detect import detect_samples

BLUE = str(WORDS.index("blue"))  # as the toy tokenizer, which knows no text, lets it be read


class Wide(Planted):
    """Sees the noise of an image too, so that images of one colour are not all alike."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.register_buffer("seen", torch.randn(48, 16, generator=g))

    def encode_image(self, x):
        noise = F.avg_pool2d(x, 4).flatten(1) @ self.seen
        return torch.cat([super().encode_image(x), noise], 1)

    def encode_text(self, tokens):
        return F.pad(super().encode_text(tokens), (0, 16))


def world(n, poisoned):
    """(pairs, truth) whose captions differ in the colour alone."""
    pairs, truth = planted_pairs(n, poisoned)
    colours = [next(c for c in COLOURS if c in caption) for caption in pairs.captions]
    return replace(pairs, captions=[f"a photo of a {c}" for c in colours]), truth


PAIRS, TRUTH = world(600, 40)


def detect(pairs=PAIRS, **options):
    given = {"tokenizer": WordTokenizer(), "mean": MEAN, "std": STD, "progress": False, "k": 40}
    return detect_samples(Wide().train(), pairs, method="fragility", **(given | options))


@pytest.fixture(scope="module")
def found():
    return detect(truth=TRUTH, k=np.int64(40))


def test_the_planted_pairs_come_first(found):
    assert set(found.top(40)) == set(np.flatnonzero(TRUTH))
    measures = found.measures()
    assert measures["auroc"] == 1 and measures["at"][0]["precision"] == 1
    settings = json.loads(json.dumps(found.settings))
    assert settings.pop("swing") > 0.5
    assert settings == {"k": 40, "precision": "fp32", "found": 40, "word": BLUE}
    blue = np.array(["blue" in caption for caption in PAIRS.captions])
    assert found.scores[blue].min() > found.scores[~blue].max()
    assert len(set(found.scores[~blue])) == 1 and len(set(found.scores[blue])) == blue.sum()
    assert found.scores.dtype == np.float64 and not found.broken


def test_how_many_are_suspicious_is_found():
    pairs, truth = world(1800, 120)
    found = detect(pairs, k=None)
    assert found.settings["k"] is None and found.settings["word"] == BLUE
    number = found.settings["found"]
    assert 60 <= number <= 130 and truth[found.top(number)].mean() > 0.9
    assert truth[found.top(120)].all()


def test_loaders_and_batches_of_any_size_give_the_same_scores(found):
    shuffled = PairLoader(PAIRS, WordTokenizer(), batch_size=64, seed=3)
    pixels = PAIRS.images.take(np.arange(600))
    tokens, ids = WordTokenizer()(list(PAIRS.captions)), torch.arange(600) + 100
    batches = [(pixels[s], tokens[s], ids[s]) for s in (slice(0, 350), slice(350, 600))]
    for source in (shuffled, iter(batches)):
        again = detect(source, tokenizer=None, batch_size=77)
        np.testing.assert_allclose(again.scores, found.scores, rtol=1e-4, atol=1e-4)
        assert again.settings["word"] == BLUE
    assert again.ids.tolist() == ids.tolist()
    floats = [(torch.zeros(4, 3, 16, 16), tokens[:4])]
    with pytest.raises(TypeError, match="pairs must yield uint8 images.*got torch.float32"):
        detect(floats)


def test_broken_images_have_no_score_and_a_reason(tmp_path):
    table = image_table(tmp_path, 30)
    lines = [f"{i}.png,a photo of a {COLOURS[i % 2]}" for i in range(30)]
    table.write_text("\n".join(["image,caption", *lines]))
    options = {"image_size": 16, "resize_mode": "squash", "cache_dir": tmp_path / "cache"}
    for broken in (4, 17):
        cut(tmp_path / f"{broken}.png")
    pairs = pairs_from_csv(table, max_bad=0.1, **options)
    model_options = {"k": 5, "batch_size": 7}
    found = detect(pairs, **model_options)
    assert np.flatnonzero(np.isnan(found.scores)).tolist() == [4, 17] == sorted(found.broken)
    assert found.broken[4] == pairs.ledger.rows[0].reason and len(found.order) == 28
    usable = np.setdiff1d(np.arange(30), [4, 17])
    wanted = detect(pairs.subset(usable), **model_options)
    np.testing.assert_allclose(found.scores[usable], wanted.scores, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="pairs must hold at least 2 usable pairs, got 0"):
        detect(pairs.subset(np.array([4, 17])))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "fragilty"}, "got 'fragilty' .did you mean 'fragility'"),
        ({"k": None}, "at least 512 pairs, twice k, .* got 0 at most"),
        ({"k": 301}, "at least 602 pairs, twice k"),
        ({"k": 4}, "k must be an integer of at least 5 for fragility, got 4"),
        ({"k": 20.0}, "k must be an integer of at least 5 for fragility, got 20.0"),
        ({"reference": 0}, "reference is for methods of neighbours, got it with 'fragility'"),
        ({"overfit": Wide()}, "overfit.* is for gain alone, got it with 'fragility'"),
        ({"tokenizer": None}, "tokenizer is needed: fragility compares"),
        ({"truth": np.zeros(599, bool)}, r"truth must be \[600\] bool.*got bool \[599\]"),
        ({"mean": None, "std": None}, "mean and std are unknown"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"precision": "fp8"}, "precision must be one of"),
    ],
)
def test_bad_arguments_are_named(options, message):
    given = {"tokenizer": WordTokenizer(), "mean": MEAN, "std": STD, "progress": False, "k": 40}
    with pytest.raises(ValueError, match=message):
        detect_samples(Wide(), PAIRS, **({"method": "fragility"} | given | options))
