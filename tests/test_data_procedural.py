"""Synthetic pairs: pictures keyed by (seed, index), and captions that say what is on them."""

import math
import re

import numpy as np
import pytest

from pybackdoor.data import PairLoader, procedural, procedural_pairs

SIDE = 96
GROUND = re.compile(r"(?:on|before) (\w+) (?:red|yellow|pink|orange)\.")
AREAS = {  # of a shape of radius 1
    "circle": math.pi,
    "ring": 0.75 * math.pi,
    "square": 1.6**2,
    "triangle": 0.75 * 3**0.5,
    "diamond": 2.0,
    "cross": 2 * 0.6 * 1.9 - 0.6**2,
}
LONE = re.compile(r"a (small|large) plain (\w+) (\w+) (?:on|before) plain (\w+)\.")
BESIDE = re.compile(r"an? (\w+) \w+ (left of|right of|above|below) an? (\w+) \w+ on plain (\w+)\.")


@pytest.fixture(scope="module")
def pairs():
    return procedural_pairs(9000, image_size=SIDE, seed=3)


def those_matching(pattern, pairs, most=400):
    """(match, image) of the first captions that match."""
    matches = [(i, m) for i, c in enumerate(pairs.captions) if (m := pattern.search(c))][:most]
    images = pairs.images.take(np.array([i for i, _ in matches]))
    return [(match, image) for (_, match), image in zip(matches, images, strict=True)]


def different_from_ground(image):  # [H, W, 3] on plain ground
    return (np.abs(image.astype(int) - image[0, 0]) > 30).any(-1)


def named(pixel):  # [3] mean colour
    """The palette's colour that some light makes nearest."""

    def distance(colour):
        lights = np.linspace(0.75, 1.1, 15)[:, None]
        return np.abs(lights * np.array(colour) - pixel / 255).sum(1).min()

    return min(procedural.COLOURS, key=lambda name: distance(procedural.COLOURS[name]))


def share_of_equal(found):
    return np.mean([a == b for a, b in found])


def test_a_pair_depends_on_seed_and_index_alone(pairs, monkeypatch):
    images = pairs.images.take(np.arange(40))
    few = procedural_pairs(40, image_size=SIDE, seed=3)
    assert list(few.captions) == list(pairs.captions[:40])
    assert (few.images.take(np.array([31, 7, 7])) == images[[31, 7, 7]]).all()
    monkeypatch.setattr(procedural, "_PIXELS_AT_ONCE", 3 * SIDE * SIDE)  # in pieces of three
    assert (few.images.take(np.arange(10)) == images[:10]).all()
    other = procedural_pairs(40, image_size=SIDE, seed=4)
    assert list(other.captions) != list(few.captions)
    assert (other.images.take(np.arange(40)) != images).any((1, 2, 3)).all()
    assert few.locations[7] == "procedural:3:7" and few.ids.tolist() == list(range(40))


def test_lone_shapes_have_the_area_and_the_colours_that_the_caption_names(pairs):
    colours, shapes = [], set()
    for match, image in those_matching(LONE, pairs):
        size, colour, shape, ground = match.groups()
        there = different_from_ground(image)
        if abs(image[there].mean(0) - image[0, 0]).max() < 60:  # too alike to be told apart
            continue
        radius = procedural.SIZES[size] * SIDE / 2
        assert there.sum() == pytest.approx(AREAS[shape] * radius**2, rel=0.12), match[0]
        shapes.add((shape, size))
        colours += [(colour, named(np.median(image[there], 0))), (ground, named(image[0, 0]))]
    assert len(shapes) == 2 * len(AREAS) and len(colours) > 40
    assert share_of_equal(colours) > 0.85


def test_two_shapes_are_where_the_caption_says(pairs):
    found = []
    for match, image in those_matching(BESIDE, pairs, most=100):
        first, place, second, _ = match.groups()
        image = image if place in ("above", "below") else image.transpose(1, 0, 2)
        halves = np.split(image, 2)
        if place in ("below", "right of"):
            halves.reverse()
        for colour, half in zip((first, second), halves, strict=True):
            there = (np.abs(half.astype(int) - image[0, 0]) > 30).any(-1)
            if there.sum() > SIDE:
                found.append((colour, named(np.median(half[there], 0))))
    assert len(found) > 60 and share_of_equal(found) > 0.85


def test_every_word_occurs_and_only_plain_grounds_are_flat(pairs):
    words = set(re.findall(r"\w+", " ".join(pairs.captions)))
    assert words >= {*procedural.COLOURS, *procedural.TEXTURES, *procedural.SHAPES}
    spreads = {texture: [] for texture in procedural.TEXTURES}
    for match, image in those_matching(GROUND, pairs):
        frame = np.concatenate([image[:6].reshape(-1, 3), image[-6:].reshape(-1, 3)])
        spreads[match[1]].append(frame.std(0).max())
    typical = {texture: np.median(values) for texture, values in spreads.items()}
    assert typical.pop("plain") < 6 < 15 < min(typical.values())


def test_captions_fit_a_short_context():
    import open_clip

    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=14)
    pairs = procedural_pairs(3000, image_size=(8, 16), seed=0)
    assert max(len(tokenizer.encode(caption)) + 2 for caption in pairs.captions) == 14
    assert pairs.captions[0] == "a black circle below a black ring on plain blue."
    batch = next(iter(PairLoader(pairs, tokenizer, batch_size=4, progress=False)))
    assert batch["images"].shape == (4, 8, 16, 3) and batch["tokens"].shape == (4, 14)


@pytest.mark.parametrize(
    ("error", "count", "words"),
    [(TypeError, 2.0, "integer, got 2.0"), (TypeError, True, "got True"), (ValueError, 1, "got 1")],
)
def test_bad_counts_are_refused(error, count, words):
    with pytest.raises(error, match=f"procedural_pairs: count must be .*{words}"):
        procedural_pairs(count, image_size=8)
