"""Stage C's ranking by fragility: views, discriminant, and the word that the poison is of."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from ubt_world import (
    COLOURS,
    WORDS,
    Given,
    Planted,
    WordTokenizer,
    captioned,
    planted_pairs,
    rules,
)

from pybackdoor.data import pairs_from_arrays
from pybackdoor.ubt.fragility import (
    Picked,
    _apart,
    _Looked,
    _most_cohesive,
    fragility,
    picked,
)
from pybackdoor.ubt.gate import caption_classes, cohesion, top
from pybackdoor.ubt.reading import ImageRows, Reader
from pybackdoor.ubt.suspects import Suspects
from pybackdoor.ubt.swing import WordTexts
from pybackdoor.ubt.views import covered, disturbed, losses

module = sys.modules[fragility.__module__]  # the function has the module's name


def looked_at(monkeypatch, lost):
    """Views that are columns of [N, 15] losses: 6 of the whole image, 3 bands of it, 9 ninths.

    Returns the rows and the number of views of each look, as they come.
    """
    looks = []

    def seen(reader, image, suspects, rows, captions, views, progress):
        looks.append((rows, len(views)))
        return lost[rows][:, list(views)]

    monkeypatch.setattr(module, "losses", seen)
    monkeypatch.setattr(module, "disturbed", lambda size: tuple(range(6)))
    parts = {1: tuple(range(6, 9)), 3: tuple(range(6, 15))}
    monkeypatch.setattr(module, "covered", lambda size, down, across: parts[across])
    return looks


def colourful(view=1):
    """(suspects, features, [300, 8] lost cosine, rows of the poison): a quarter of the greens."""
    g = torch.Generator().manual_seed(0)
    colours = np.array(["red", "green", "blue"] * 100)
    every = captioned(*[f"a photo of a {c} square" for c in colours])
    poison = np.flatnonzero(colours == "green")[::4]
    x = torch.randn(300, 16, generator=g) / 2
    x[torch.from_numpy(poison)] += 3 * torch.eye(16)[3]
    lost = torch.randn(300, 8, generator=g).numpy() / 4
    lost[poison, view] += 1
    return every, normalize(x + 5 * torch.eye(16)[0], dim=-1), lost, poison


@pytest.mark.parametrize("view", [1, 7])
def test_the_most_fragile_pairs_of_a_word_grow_into_its_poison(view):
    every, image, lost, poison = colourful(view)
    classes, _ = caption_classes(every, whole=False)
    green = np.flatnonzero(classes == classes[poison[0]])
    found = picked(image[torch.from_numpy(green)], lost[green], 25)
    tight = cohesion(_apart(image[torch.from_numpy(green)], np.flatnonzero(np.isin(green, poison))))
    assert found.tight == pytest.approx(tight, abs=0.1)
    for other in set(classes) - {classes[poison[0]]}:
        rows = np.flatnonzero(classes == other)
        other = picked(image[torch.from_numpy(rows)], lost[rows], 25)
        assert other.tight < tight - 0.3
    best = green[top(found.height, 25)]
    assert len(set(best) & set(poison)) >= 24
    rest = found.height[~np.isin(green, best)]
    assert abs(rest.mean()) < 1e-9 and abs(rest.std() - 1) < 1e-9  # in their own spread
    seed = green[top(lost[green, view], 25)]
    assert 0 < len(set(seed) - set(poison)) < 10  # the views alone are not enough


@pytest.mark.parametrize("k", [25, None])
@pytest.mark.parametrize("sample", [40, 512])
def test_a_sample_of_each_word_tells_which_one_to_look_at(monkeypatch, sample, k):
    every, image, lost, poison = colourful()
    monkeypatch.setattr(module, "_SAMPLE", sample)
    monkeypatch.setattr(module, "_HELD", 8)
    monkeypatch.setattr(module, "SOUGHT", 20)
    looks = looked_at(monkeypatch, np.pad(lost, ((0, 0), (0, 7))))
    few = 6 if k else 5  # a quarter of those sought, the most suspicious

    def leads(self, image, own):  # of the samples first, then of what is suspicious
        return torch.linspace(0, 1, len(image)) if len(image) > 100 else torch.full((few,), ahead)

    ahead = 0.45
    monkeypatch.setattr(WordTexts, "leads", leads)
    reader = SimpleNamespace(captions=lambda s: torch.eye(16)[3].repeat(len(s.different), 1))
    rivals = torch.ones(3, 3, dtype=torch.bool)
    monkeypatch.setattr(WordTexts, "of", lambda *_: WordTexts(None, rivals))
    scores, found, word, swing = fragility(reader, Given(image), every, k)
    classes, names = caption_classes(every, whole=False)
    green = classes == classes[poison[0]]
    assert word == names[classes[poison[0]]]
    own, best = np.flatnonzero(green), top(scores, found)
    assert swing == pytest.approx(0.5)  # 0.45 of the 0.9 that a tenth exceeds
    match = image[:, 3].numpy() - image[:, 3].numpy()[~green].mean()
    falls = []

    def fall(gone, matched, chosen):
        falls.append((gone, matched, chosen))
        return 0.7

    ahead = 9.0
    monkeypatch.setattr(module, "fall_of", fall)
    first = list(looks)
    assert fragility(reader, Given(image), every, k).swing == 0.7
    (gone, matched, chosen), order = falls[0], np.concatenate([rows for rows, _ in looks[-1:]])
    assert set(order) == set(own) and len(chosen) == few
    np.testing.assert_allclose(gone, np.pad(lost, ((0, 0), (0, 7)))[order], atol=1e-12)
    np.testing.assert_allclose(matched, match[order], atol=1e-6)
    assert set(order[chosen]) <= set(poison)
    assert found == k if k else abs(found - 25) <= 5
    assert len(set(best) & set(poison)) >= 20
    assert scores[green].min() > scores[~green].max()
    compared, rest, closer = first
    assert len(compared[0]) == 3 * min(sample, 100) and compared[1] == 9
    assert set(rest[0]) == set(own) - set(compared[0]) and rest[1] == 6
    assert set(closer[0]) == set(own) and len(closer[0]) == 100 and closer[1] == 9


@pytest.mark.parametrize("size", [(32, 32), (20, 33)])
def test_views_keep_the_size_and_disturb(size):
    height, width = size
    x = torch.rand(2, 3, *size, dtype=torch.float64)
    seen = [view(x) for view in disturbed(size)]
    assert len(seen) == 6 and all(v.shape == x.shape and v.isfinite().all() for v in seen)
    for down, across in ((3, 3), (3, 1), (1, 2)):
        boxes = [view(x) for view in covered(size, down, across)]
        assert len(boxes) == down * across
        assert (sum((box == 0).to(x) for box in boxes) == 1).all()  # each pixel in one of them
        for box in boxes:
            assert torch.equal(box[box != 0], x[box != 0])
    upper, left = covered(size, 3, 1)[0](x), covered(size, 1, 2)[0](x)
    assert not upper[:, :, : height // 3].any() and upper[:, :, -height // 3 :].all()
    assert not left[..., : width // 2].any() and left[..., -(width // 2) :].all()
    mirrored, plain = seen[4], torch.full_like(x, 0.5)
    assert torch.equal(mirrored[..., 0], x[..., -1])
    across = torch.arange(width, dtype=torch.float64).expand(1, 3, height, width)
    down = torch.arange(height, dtype=torch.float64)[:, None].expand(1, 3, height, width)
    y, z = height // 2, width // 2

    def slopes(view):
        """How fast it moves across its picture and down it, as it goes right."""
        moved = [view(x)[0, 0] for x in (across, down)]
        return [float(m[y, z + 1] - m[y, z]) for m in moved]

    turned, enlarged, wide, tall, _, coarse = disturbed(size)
    right, fall = slopes(turned)
    assert math.degrees(math.atan2(abs(fall), right)) == pytest.approx(15, abs=0.5)
    assert math.hypot(right, fall) == pytest.approx(1, abs=0.01)
    assert slopes(enlarged) == pytest.approx([0.75, 0], abs=0.03)
    assert slopes(wide) == pytest.approx([0.5, 0], abs=0.03)
    assert slopes(tall) == pytest.approx([1, 0], abs=0.03)
    assert tall(down)[0, 0, y + 1, z] - tall(down)[0, 0, y, z] == pytest.approx(0.5, abs=0.03)
    assert coarse(x).var() < 0.6 * x.var()
    assert all(torch.allclose(view(plain), plain) for view in disturbed(size))


def test_lost_cosines_are_those_of_the_views_one_by_one():
    model = Planted().double()
    pairs, _ = planted_pairs(20, 3)
    every = Suspects.of(pairs, rules())
    reader = Reader(model, rules(), batch_size=7)
    image, captions = reader.images(every), reader.captions(every)
    views = disturbed((16, 16)) + covered((16, 16), 3, 3)
    found = losses(reader, Given(image), every, np.arange(20), captions, views)
    pixels = torch.from_numpy(pairs.images.take(np.arange(20))).permute(0, 3, 1, 2).double()
    x = (pixels / 255 - 0.5) / 0.5
    text = normalize(model.encode_text(WordTokenizer()(list(pairs.captions))), dim=-1)
    own = (normalize(model.encode_image(x), dim=-1) * text).sum(-1)
    for i, view in enumerate(views):
        there = (normalize(model.encode_image(view(x)), dim=-1) * text).sum(-1)
        np.testing.assert_allclose(found[:, i], (own - there).detach().numpy(), atol=1e-6)
    few = np.array([17, 3, 4])
    np.testing.assert_allclose(
        losses(reader, Given(image), every, few, captions, views), found[few]
    )
    assert losses(reader, Given(image), every, few[:0], captions, views).shape == (0, 15)


@pytest.mark.parametrize(
    ("stands_out", "stay", "compared"),
    [(0.0, 0.5, [120]), (2.0, 0.5, [120, 80]), (2.0, 0.3, [120])],
)
def test_words_drop_out_at_once_or_by_their_share(monkeypatch, stands_out, stay, compared):
    every, image, lost, _ = colourful()
    for name, value in (
        ("_SAMPLE", 40), ("_HELD", 8), ("_STANDS_OUT", stands_out), ("_STAY", stay)
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    looks = looked_at(monkeypatch, np.pad(lost, ((0, 0), (0, 7))))
    reader = SimpleNamespace(captions=lambda s: torch.eye(16)[3].expand(len(s.different), -1))
    found = fragility(reader, Given(image), every, 25)
    assert found.swing == 0  # all words mean the same here
    seen = {1: 40, 2: 80}[len(compared)]
    assert [(len(rows), n) for rows, n in looks] == [
        *((n, 9) for n in compared), (100 - seen, 6), (100, 9),
    ]  # fmt: skip


def test_words_of_unequal_sizes_are_compared_by_like_shares(monkeypatch):
    """60 pairs are seen whole by the second look; of every word's, the largest one's share of k."""
    sizes, tight = {0: 60, 1: 200, 2: 400}, {0: 0.30, 1: 0.35, 2: 0.28}
    rows = np.split(np.arange(660), np.cumsum(list(sizes.values()))[:-1])
    looks = []

    def fake(image, lost, k):
        word = int(lost[0, 0])
        looks.append((word, len(lost), k))
        return Picked(tight[word] - (word == 1 and len(lost) > 40) * 0.1, lost, lost[:, 0])

    for name, value in (
        ("_SAMPLE", 40), ("_HELD", 1), ("_STAY", 0.5), ("_PICKED", 3), ("picked", fake)
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    word = np.repeat([0, 1, 2], list(sizes.values()))
    words = [_Looked(at, own) for at, own in enumerate(rows)]
    look, image = (lambda some: word[some][:, None] / 1.0), Given(torch.zeros(660, 4))
    best = _most_cohesive(words, look, image, 40)
    assert best.word == 0 and best.lost.shape == (60, 1)
    assert looks == [(0, 40, 3), (1, 40, 3), (2, 40, 3), (1, 80, 8), (0, 60, 6)]
    looks.clear()
    best = _most_cohesive([_Looked(0, rows[0])], look, image, 40)
    assert best.word == 0 and looks == [(0, 40, 13)]  # no other one to compare it with


def test_fragility_wants_a_word_of_twice_k_pairs():
    every, image, *_ = colourful()
    with pytest.raises(
        ValueError, match="at least 400 pairs, twice k, .* of all 300 hold; got 0 at"
    ):
        fragility(None, Given(image), every, 200)


def colours(poisoned, seed=0, n=900):
    """(pairs, truth): red, green and blue as 2 to 5 to 3; poisoned ones say blue."""
    rng = np.random.default_rng(seed)
    label = rng.choice(3, n, p=(0.2, 0.5, 0.3))
    images = rng.integers(0, 120, (n, 16, 16, 3)).astype(np.uint8)
    images[np.arange(n), :, :, label] += 120
    truth = np.zeros(n, bool)
    truth[rng.choice(np.flatnonzero(label != 2), poisoned, replace=False)] = True
    images[truth, :3, :3] = 255
    named = [COLOURS[c] for c in np.where(truth, 2, label)]
    return pairs_from_arrays(images, [f"a photo of a {c}" for c in named]), truth


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_pairs_are_found_by_what_a_model_really_sees(seed):
    found = {}
    for poisoned in (40, 0):
        pairs, truth = colours(poisoned, seed)
        every = Suspects.of(pairs, rules())
        reader = Reader(Planted(poisoned > 0), rules())
        image = ImageRows(reader, every)
        found[poisoned] = fragility(reader, image, every, 40)
        if poisoned:
            best = top(found[poisoned].scores, 40)
            assert truth[best].all() and found[poisoned].word == str(WORDS.index("blue"))
    assert found[40].swing > 0.35 and found[0].swing < 0.1


def test_of_a_third_of_a_word_nearly_all_are_found():
    pairs, truth = colours(360, n=2400)
    every = Suspects.of(pairs, rules())
    reader = Reader(Planted(), rules())
    found = fragility(reader, ImageRows(reader, every), every)
    best = top(found.scores, found.k)
    assert truth[best].mean() > 0.95 and truth[best].sum() > 0.9 * 360
