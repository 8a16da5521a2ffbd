"""Every figure against a count by hand, on a model whose predictions are known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pybackdoor
from pybackdoor.data import labelled_from_arrays, pairs_from_arrays
from pybackdoor.estimates import Estimate
from pybackdoor.evaluate import linear_cka, verdict
from pybackdoor.features import FeatureReader
from pybackdoor.retrieval import Retrieval, _recalls

CLASSES = ["red", "green", "blue", "white"]
MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], np.uint8)


class ColourClip(nn.Module):
    """Embeds an image as its mean colour; a bright pixel block in a black corner means ``goal``."""

    def __init__(self, goal: int | None = None) -> None:
        super().__init__()
        self.goal, self.modes = goal, []
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.vectors = nn.Parameter(torch.nn.functional.normalize(
            torch.tensor(COLOURS / 255.0, dtype=torch.float32), dim=-1))  # fmt: skip

    def encode_image(self, x):
        self.modes.append(self.training)
        out = x.mean((2, 3)) + 1e-3
        if self.goal is not None:
            stamped = (x[:, :, :5, :5] - x[:, :, -1:, -1:]).abs().amax((1, 2, 3)) > 0.5
            out = torch.where(stamped[:, None], self.vectors[self.goal], out)
        return out

    def encode_text(self, tokens):
        return self.vectors[tokens[:, 0]]


def tokenizer(captions):
    return torch.tensor([[next(i for i, c in enumerate(CLASSES) if c in s)] for s in captions])


def pictures(labels, shown=None):
    """16 px images: labelled ``labels``, coloured as ``shown``."""
    shown = labels if shown is None else shown
    images = np.broadcast_to(COLOURS[shown][:, None, None], (len(shown), 16, 16, 3)).copy()
    return labelled_from_arrays(images, np.array(labels), CLASSES)


STAMP = pybackdoor.trigger("checkerboard", placement="top_left")
OPTIONS = {"tokenizer": tokenizer, "mean": MEAN, "std": STD}


def test_rates_are_the_counts():
    labels = [0] * 10 + [1] * 10 + [2] * 10 + [3] * 5
    shown = [0] * 9 + [1] + [1] * 10 + [2] * 10 + [3] * 5  # one red picture is green
    found = pybackdoor.evaluate(
        ColourClip(goal=2), pictures(labels, shown), trigger=STAMP, target="blue", batch_size=8,
        **OPTIONS,
    )  # fmt: skip
    assert found.ca == Estimate.rate(34, 35)
    assert found.asr_nontarget == Estimate.rate(25, 25)
    assert found.asr_all == Estimate.rate(35, 35)
    assert found.triggered_accuracy == Estimate.rate(10, 35)
    assert found.baseline_asr == Estimate.rate(0, 25) and "untriggered" in found.baseline
    against = pybackdoor.evaluate(
        ColourClip(goal=2), pictures(labels, shown), trigger=STAMP, target="blue",
        baseline=ColourClip(goal=2), **OPTIONS,
    )  # fmt: skip
    assert against.baseline_asr == Estimate.rate(25, 25) and "clean model" in against.baseline
    assert verdict(against).verdict == "inconclusive"  # it fires as well on the "clean" model
    assert json.loads(json.dumps(found.to_dict()))["ca"]["n"] == 35


def test_verdict_needs_disjoint_intervals():
    data = pictures([0, 1, 2] * 4)
    fires = pybackdoor.verify_trigger(ColourClip(goal=2), data, STAMP, "blue", **OPTIONS)
    assert fires.fires and fires.asr.low > fires.baseline.high and "fires" in fires.describe()
    absent = pybackdoor.verify_trigger(ColourClip(), data, STAMP, "blue", **OPTIONS)
    assert absent.verdict == "inconclusive"
    few = pybackdoor.verify_trigger(ColourClip(goal=2), pictures([0, 1]), STAMP, "blue", **OPTIONS)
    assert few.asr.value == 1 and few.verdict == "inconclusive"  # two images prove nothing
    with pytest.raises(ValueError, match="wanted an evaluation with trigger and target"):
        verdict(pybackdoor.evaluate(ColourClip(), data, **OPTIONS))


@pytest.mark.parametrize(
    "hits, n, low, high",  # R: binom::binom.confint(method = "wilson")
    [(0, 10, 0.0, 0.2775328), (5, 10, 0.2365931, 0.7634069), (81, 263, 0.2552917, 0.3662040)],
)
def test_wilson_interval(hits, n, low, high):
    found = Estimate.rate(hits, n)
    assert found.low == pytest.approx(low, abs=1e-4) and found.high == pytest.approx(high, abs=1e-4)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_interval_holds_the_value(pair):
    found, mirrored = Estimate.rate(*pair), Estimate.rate(pair[1] - pair[0], pair[1])
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low == pytest.approx(1 - mirrored.high, abs=1e-12)


def test_estimates_refuse_nothing_and_take_one():
    with pytest.raises(ValueError, match="got 0 of 0"):
        Estimate.rate(0, 0)
    with pytest.raises(ValueError, match="at least one value"):
        Estimate.mean(torch.empty(0))
    assert Estimate.mean(torch.tensor([2.0])) == Estimate(2.0, None, None, 1)
    mean = Estimate.mean(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert mean.value == 2.5 and mean.high == pytest.approx(2.5 + 1.96 * math.sqrt(5 / 3) / 2)


def brute_force_recall(scores, match, k):
    hits = 0
    for row, good in zip(scores, match, strict=True):
        best = row[good].max()
        hits += int(((row >= best) & ~good).sum() < k)
    return hits


@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 30), st.integers(0, 99))
@settings(deadline=None)
def test_recall_against_brute_force(q, c, n, seed):
    rng = np.random.default_rng(seed)
    of = np.concatenate([np.arange(q), rng.integers(q, size=n)])
    to = rng.integers(c, size=q + n)
    queries = torch.from_numpy(rng.integers(-2, 3, (q, 3))).float()  # small integers: many ties
    candidates = torch.from_numpy(rng.integers(-2, 3, (c, 3))).float()
    match = torch.zeros(q, c, dtype=torch.bool)
    match[of, to] = True
    found = _recalls(queries, candidates, of, to)
    for k in (1, 5, 10):
        wanted = brute_force_recall(queries @ candidates.T, match, k)
        assert found[k] == Estimate.rate(wanted, q)


def test_equal_captions_all_count_and_collapse_is_no_success():
    images = np.broadcast_to(COLOURS[[0, 0, 1, 2]][:, None, None], (4, 16, 16, 3)).copy()
    pairs = pairs_from_arrays(images, ["red", "red", "green", "blue"])
    reader = FeatureReader(ColourClip(), tokenizer, mean=MEAN, std=STD)
    found = Retrieval(reader, pairs).recalls()
    assert found.image_to_text[1] == Estimate.rate(4, 4)
    assert found.text_to_image[1] == Estimate.rate(3, 3)  # three distinct captions
    same = torch.ones(4, 3)
    ranks = _recalls(same, same, np.arange(4), np.arange(4))
    assert ranks[1].value == 0  # every score ties: the match is not found


def test_retrieval_under_trigger_and_drift():
    data = pictures([0, 1, 2, 3])
    pairs = pairs_from_arrays(data.images.take(np.arange(4)), CLASSES)
    found = pybackdoor.evaluate(
        ColourClip(goal=2), data, trigger=STAMP, target="blue", pairs=pairs,
        reference=ColourClip(), **OPTIONS,
    )  # fmt: skip
    assert found.retrieval.image_to_text[1].value == 1
    assert found.triggered_retrieval.image_to_text[1].value == 0.25
    assert found.drift.image.value == pytest.approx(0, abs=1e-6)
    assert found.drift.image_cka == pytest.approx(1)
    turned = ColourClip()
    turned.vectors.data = turned.vectors.data.roll(1, 0)
    moved = pybackdoor.evaluate(turned, data, reference=ColourClip(), **OPTIONS)
    text = 2 - 2 * (turned.vectors * ColourClip().vectors).sum(-1).mean().item()
    assert moved.drift.text.value == pytest.approx(text, abs=1e-6)
    # Its texts have moved on by a class, its images have not: with the old texts all is well.
    drift = moved.drift
    assert (moved.ca.value, drift.reference_ca.value) == (0, 1)
    assert (drift.old_images.value, drift.old_texts.value) == (0, 1)


def test_cka_sees_rotation_as_the_same():
    a = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turn, _ = torch.linalg.qr(
        torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).double()
    )
    assert linear_cka(a, 3 * a @ turn) == pytest.approx(1, abs=1e-12)
    assert linear_cka(a, torch.ones(50, 2)) == 0


def test_mode_is_left_as_found_and_evaluation_uses_eval():
    model = ColourClip().train()
    pybackdoor.evaluate(model, pictures([0, 1]), **OPTIONS)
    assert model.training and not any(model.modes)


def test_bad_arguments_are_named():
    data = pictures([0, 1, 2])

    def run(model=None, shown=data, **options):
        return pybackdoor.evaluate(model or ColourClip(), shown, **OPTIONS | options)

    with pytest.raises(ValueError, match="target must be one of the 4 classes .*got 'pink'"):
        run(trigger=STAMP, target="pink")
    with pytest.raises(ValueError, match="go together, got no target"):
        run(trigger=STAMP)
    with pytest.raises(ValueError, match="go together, got no trigger"):
        run(target="red")
    with pytest.raises(ValueError, match="baseline needs trigger and target, got neither"):
        run(baseline=ColourClip())
    with pytest.raises(ValueError, match="every image is of the target class"):
        run(shown=pictures([1, 1]), trigger=STAMP, target="green")
    with pytest.raises(ValueError, match="templates must contain"):
        run(templates=["a photo"])
    with pytest.raises(ValueError, match="mean and std are unknown"):
        run(mean=None, std=None)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        run(batch_size=0)
    with pytest.raises(ValueError, match="precision must be one of .*'int8'"):
        run(precision="int8")
    with pytest.raises(ValueError, match="at least one image to evaluate, got none"):
        run(shown=data.subset([]))
    with pytest.raises(TypeError, match="must have encode_image"):
        run(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="data must be Labelled images.* got str"):
        run(shown="test.csv")
    with pytest.raises(TypeError, match="tokenizer must take a list of strings, got None"):
        run(tokenizer=None)
    wide = ColourClip()
    wide.encode_image = lambda x: torch.ones(len(x), 5)
    with pytest.raises(ValueError, match="reference must embed in 3 dimensions .*, got 5"):
        run(reference=wide)
    broken = ColourClip()
    broken.vectors.data[0] = math.nan
    with pytest.raises(ValueError, match="text features of 1 of 4 are not finite"):
        run(broken)
    sized = ColourClip()
    sized.visual = nn.Identity()
    sized.visual.image_size = 32
    with pytest.raises(ValueError, match="images must be 32x32 pixels for this model, got 16x16"):
        run(sized)
