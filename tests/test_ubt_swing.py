"""Stage C's last question, whether what ranks highest is poison: its lead, and what it loses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from ubt_world import Given, captioned, unit

from pybackdoor.ubt.gate import gate
from pybackdoor.ubt.swing import WordTexts, fall_of


@pytest.mark.parametrize(
    "theirs, rest, fall",
    [
        ([0.5, 0.1], [0.1, 0.1], 0.8),  # they lose all of 0.5, the others a fifth
        ([0.9, 0.1], [0.1, 0.1], 0.8),  # what is gone is gone
        ([0.5, 0.1], [0.4, 0.1], 0.2),  # the view leaves little of any image of the word
        ([0.5, 0.3], [0.5, 0.0], 0.6),  # of the views, the one that tells them apart
        ([-0.2, 0.1], [0.0, -0.3], 0.2),  # nothing is gained by what is matched better
    ],
)
def test_a_fall_counts_where_the_others_keep_their_match(theirs, rest, fall):
    lost = np.array([theirs] * 3 + [rest] * 7)
    match = np.full(10, 0.5)
    assert fall_of(lost, match, np.arange(3)) == pytest.approx(fall)
    assert fall_of(lost, -match, np.arange(3)) == 0


def test_words_that_mean_the_same_are_no_rivals():
    captions = normalize(torch.tensor([[9.0, 1, 0], [9, 1, 0.01], [9, 0, 1], [9, 0, 1.01]]), dim=-1)
    classes, caption = np.array([0, 0, 1, 2]), np.array([0, 1, 2, 3])
    words = WordTexts.of(captions, caption, classes)
    np.testing.assert_allclose(words.text[0], normalize(captions[:2].mean(0), dim=0), atol=1e-6)
    assert words.rival.tolist() == [[False, True, True], [True, False, False], [True, False, False]]
    image = normalize(torch.tensor([[1.0, 2, 1], [0, 0, 1]]), dim=-1)
    cosine = image @ words.text.T
    wanted = [cosine[0, 0] - cosine[0, 1:].max(), cosine[1, 1] - cosine[1, 0]]
    np.testing.assert_allclose(words.leads(image, np.array([0, 1])), wanted, atol=1e-6)
    alone = WordTexts.of(captions[:2], np.arange(2), np.zeros(2, int))
    assert not alone.rival.any()
    rng = np.random.default_rng(0)  # more than are looked at at a time
    text, one = unit(6, 4), rng.integers(0, 6, 9000)
    many, few = (WordTexts(text, ~torch.eye(6, dtype=torch.bool)).leads(unit(9000, 4)[:n], one[:n])
                 for n in (9000, 50))  # fmt: skip
    torch.testing.assert_close(many[:50], few)
    times = WordTexts.of(unit(6, 4), np.arange(9000) % 6, np.arange(9000) % 2)
    torch.testing.assert_close(times.text[1], normalize(unit(6, 4)[1::2].sum(0), dim=0))
    np.testing.assert_allclose(alone.leads(image, np.zeros(2, int)), image @ alone.text[0])


def test_the_gate_wants_a_clear_swing():
    g = torch.Generator().manual_seed(0)
    colours = np.array(["red", "green", "blue"] * 100)
    every, poison = captioned(*[f"a photo of a {c} square" for c in colours]), np.arange(1, 300, 12)
    x = torch.randn(300, 16, generator=g) / 2
    x[torch.from_numpy(poison)] += 3 * torch.eye(16)[3]
    image = Given(normalize(x + 5 * torch.eye(16)[0], dim=-1))
    alone = gate(image, every, poison, sets=99, excess=0.3)
    assert alone.fires and alone.swing is None and "swing" not in alone.describe()
    low, high = (gate(image, every, poison, sets=99, excess=0.3, swing=f) for f in (0.59, 0.61))
    assert not low.fires and high.fires and high.swing == 0.61
    assert "swing once disturbed 0.61" in high.describe()
    assert "an excess of at least 0.3, a swing of 0.6)" in high.describe()
    loose = gate(image, every, poison, sets=99, excess=0.3, swing=0.3, least_swing=0.2)
    assert loose.fires


def test_a_lead_is_in_units_of_what_few_images_have():
    text = torch.eye(3)
    rival = ~torch.eye(3, dtype=torch.bool)
    classes = np.array([0] * 10 + [1] * 10)
    ahead = np.concatenate([np.linspace(0.1, 1, 10), np.full(10, 0.1)])
    x = torch.zeros(20, 3)
    x[np.arange(20), classes] = torch.from_numpy(ahead).float()
    every, chosen = np.arange(20), np.array([7, 9])
    words = WordTexts(text, rival)
    clear = np.quantile(ahead, 0.9)
    lead = words.lead(Given(x), classes, every, chosen)
    assert lead == pytest.approx(0.9 / clear, rel=1e-6)
    assert words.lead(Given(-x), classes, every, chosen) == 0  # no image leads
    rival[0] = False
    assert words.lead(Given(x), classes, every, chosen) == 0  # nothing to be ahead of
    assert words.lead(Given(x), classes, every, np.array([12])) > 0
