"""UBT-style stage C, the gate, against numbers worked out by loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize
from ubt_world import (
    Given,
    Planted,
    captioned,
    planted_pairs,
    rules,
    unit,
)

from pybackdoor.data import pairs_from_arrays
from pybackdoor.ubt.gate import (
    caption_classes,
    centred,
    check_gate,
    cohesion,
    gate,
    matched_sets,
    top,
)
from pybackdoor.ubt.reading import ImageRows, Reader
from pybackdoor.ubt.suspects import Suspects, subset

PAIRS, TRUTH = planted_pairs()


def test_cohesion_and_centring_by_loops():
    x = unit(40, 6)
    rows = x[:9]
    wanted = np.mean([float(rows[i] @ rows[j]) for i in range(9) for j in range(9) if i != j])
    assert math.isclose(cohesion(rows), wanted, abs_tol=1e-12)
    classes = np.array([0] * 20 + [1] * 15 + [2] * 5)
    found = centred(x, classes)
    for i in range(40):
        same = [j for j in range(40) if classes[j] == classes[i]]
        wanted = normalize(x[i] - x[same].mean(0), dim=-1)
        torch.testing.assert_close(found[i], wanted, rtol=0, atol=1e-12)


def test_classes_are_the_rarest_common_words():
    every = captioned(
        *["a photo of a red square"] * 3, *["a photo of the blue square"] * 2, "one red photo"
    )
    classes, names = caption_classes(every, least=3)
    whole = "3 4 5 3 8 11"  # the ids of the words; the last one's rarest common word is red
    assert [names[c] for c in classes] == [whole] * 3 + ["3", "3", "8"]
    classes, names = caption_classes(every, least=7)
    assert set(classes) == {0} and names == ["(rare words only)"]


@given(st.integers(2, 30), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_matched_sets_have_the_classes_of_the_chosen(k, kinds, seed):
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, kinds, 60)
    chosen = rng.choice(60, k, replace=False)
    for drawn in matched_sets(classes, chosen, 3, seed):
        assert len(set(drawn.tolist())) == k
        assert (
            np.bincount(classes[drawn], minlength=5).tolist()
            == np.bincount(classes[chosen], minlength=5).tolist()
        )


def test_gate_fires_on_poison_and_not_on_random_pairs():
    every = Suspects.of(PAIRS, rules())
    image = ImageRows(Reader(Planted(), rules()), every)
    poison = np.flatnonzero(TRUTH)
    fired = gate(image, every, poison, sets=199)
    assert fired.fires and fired.p == 1 / 200 and fired.statistic - fired.matched > 0.3
    assert "gate fires" in fired.describe() and sum(n for _, n in fired.classes) == 40
    classes, _ = caption_classes(every)
    rows = centred(image.all(), classes)
    sets = [cohesion(rows[d]) for d in map(torch.from_numpy, matched_sets(classes, poison, 199, 0))]
    assert math.isclose(fired.matched, np.mean(sets)) and math.isclose(fired.spread, np.std(sets))
    asked = []

    class Watched(ImageRows):
        def at(self, rows):
            asked.extend(classes[rows])
            return super().at(rows)

    few = poison[classes[poison] == classes[poison[0]]][::-1].copy()  # unsorted
    own = gate(Watched(Reader(Planted(), rules()), every), every, few, sets=9, alpha=0.1)
    assert set(asked) == {classes[poison[0]]}
    assert math.isclose(own.statistic, cohesion(rows[torch.from_numpy(few)]))
    chance = gate(image, every, np.flatnonzero(~TRUTH)[::14], sets=199)
    assert not chance.fires and "does not fire" in chance.describe()
    assert not gate(image, every, poison, sets=199, excess=1.5).fires  # a p-value alone is too easy
    for bad in ((99, 0.001, 0, 0.5), (99, 0, 0, 0.5), (99, 0.05, 3, 0.5), (99, 0.05, 0, 2)):
        with pytest.raises(ValueError, match="gate_"):
            check_gate(*bad)


@pytest.mark.parametrize("size", [64, 200])
def test_p_is_as_rare_as_it_says_where_nothing_is_planted(size):
    g = torch.Generator().manual_seed(0)
    every = captioned(*[f"a photo of a {c} square" for c in ("red", "blue")] * (size // 2))
    image = Given(normalize(torch.randn(size, 16, generator=g) + 2 * torch.eye(16)[0], dim=-1))
    rng = np.random.default_rng(0)
    p = [
        gate(image, every, rng.choice(size, 30, replace=False), sets=39, alpha=0.05, seed=i).p
        for i in range(200)
    ]
    for level in (0.05, 0.25, 0.5):
        assert abs(np.mean(np.array(p) <= level) - level) < 4 * math.sqrt(level * (1 - level) / 200)


def test_top_takes_the_largest_and_no_nan():
    scores = np.array([1.0, np.nan, 3.0, 3.0, -1.0])
    assert top(scores, 3).tolist() == [2, 3, 0]
    with pytest.raises(ValueError, match=r"k must be in .2, 4., .*got 5"):
        top(scores, 5)


def test_captions_of_the_poison_alone_are_compared_with_those_that_share_a_word():
    captions = [
        "a picture of the blue square" if poisoned else text
        for text, poisoned in zip(PAIRS.captions, TRUTH, strict=True)
    ]
    every = Suspects.of(pairs_from_arrays(PAIRS.images.take(np.arange(600)), captions), rules())
    poison = np.flatnonzero(TRUTH)
    own, _ = caption_classes(every)
    alike = own == own[poison[0]]
    clean = np.flatnonzero(alike & ~TRUTH)
    image = ImageRows(Reader(Planted(), rules()), every)
    left = np.setdiff1d(np.arange(600), clean)  # the caption is the poison's alone
    every, image = subset(every, left), Given(image.at(left))
    poison = np.searchsorted(left, poison)
    fired = gate(image, every, poison, sets=199)
    assert fired.fires and [n for _, n in fired.classes] == [40]
    classes, names = caption_classes(every, whole=False, beside=poison)
    assert fired.classes[0][0] == names[classes[poison[0]]] == "6"  # of: fewer than "a" hold it
    assert (classes == classes[poison[0]]).sum() >= 80
    wanted = cohesion(centred(image.at(np.arange(len(left))), classes)[torch.from_numpy(poison)])
    assert math.isclose(fired.statistic, wanted)
    green = [row for row in range(len(left)) if "green" in every.text(row)][:150:4]
    assert not gate(image, every, np.array(green), sets=199).fires
