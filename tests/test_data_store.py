"""Stores and views: bytes, bounds, copies, pickles."""

import pickle

import numpy as np
import pytest
import torch

from pybackdoor.data import ArrayImages, Labelled, Overlay, Pairs
from pybackdoor.data.store import SubsetImages, subset_images

RGB = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), np.uint8)
GREY = RGB[..., 0].copy()


@pytest.mark.parametrize("kind", ["array", "tensor", "grey", "overlay", "subset"])
def test_take_is_a_copy_of_the_images_asked_for(kind):
    wanted = RGB
    if kind == "array":
        store = ArrayImages(RGB)
    elif kind == "tensor":
        store = ArrayImages(torch.from_numpy(RGB))
    elif kind == "grey":
        store, wanted = ArrayImages(GREY), np.stack([GREY] * 3, axis=3)
    elif kind == "overlay":
        store, wanted = Overlay(ArrayImages(RGB), {5: 255 - RGB[5]}), RGB.copy()
        wanted[5] = 255 - RGB[5]
    else:
        store, wanted = SubsetImages(ArrayImages(RGB), np.array([6, 0, 0, 3])), RGB[[6, 0, 0, 3]]
    assert store.image_size == (4, 5) and len(store) == len(wanted)
    rows = [3, 0, 3, len(wanted) - 1]
    for indices in (rows, np.array(rows, np.uint8), torch.tensor(rows)):
        taken = store.take(indices)
        assert type(taken) is np.ndarray and taken.dtype == np.uint8 and taken.flags.writeable
        np.testing.assert_array_equal(taken, wanted[rows])
    store.take(rows)[:] = 0  # a view would change the store
    np.testing.assert_array_equal(store.take(range(len(wanted))), wanted)
    assert store.take([]).shape == (0, 4, 5, 3)
    for outside in (-1, len(wanted)):
        with pytest.raises(IndexError, match=rf"in \[0, {len(wanted)}\), got {outside}"):
            store.take([0, outside])
    for bad in ([0.5], [True], [[0]], 0, ["0"]):
        with pytest.raises(TypeError, match="indices must be"):
            store.take(bad)
    again = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(again.take(rows), wanted[rows])


def test_array_is_kept_not_copied():
    images = RGB.copy()
    store = ArrayImages(images)
    images[0] = 7
    assert (store.take([0]) == 7).all()


@pytest.mark.parametrize(
    ("images", "error", "match"),
    [
        (RGB.astype(np.float32), TypeError, "must be uint8, got float32"),
        (RGB.astype(np.int64), TypeError, "must be uint8, got int64"),
        (RGB.transpose(0, 3, 1, 2), ValueError, r"got \[7, 3, 4, 5\]"),
        (RGB[..., :1], ValueError, r"got \[7, 4, 5, 1\]"),
        (RGB[0, 0], ValueError, r"got \[5, 3\]"),
        (RGB[:, :0], ValueError, "must have pixels"),
    ],
)
def test_array_of_another_kind(images, error, match):
    with pytest.raises(error, match=match):
        ArrayImages(images)


def test_overlay_refuses_what_does_not_fit():
    base = ArrayImages(RGB)
    with pytest.raises(IndexError, match="got 7"):
        Overlay(base, {7: RGB[0]})
    with pytest.raises(TypeError, match="image 2 must be uint8, got float64"):
        Overlay(base, {2: RGB[0] / 255})
    with pytest.raises(ValueError, match=r"image 2 must be \[4, 5, 3\] like the base"):
        Overlay(base, {2: RGB[0, :3]})
    np.testing.assert_array_equal(Overlay(base, {}).take([1, 2]), RGB[[1, 2]])


def test_overlay_over_overlay_and_order_of_patches():
    first = Overlay(ArrayImages(RGB), {6: RGB[0], 1: RGB[2]})
    second = Overlay(first, {1: RGB[3], 0: RGB[4]})
    np.testing.assert_array_equal(second.take(range(7)), RGB[[4, 3, 2, 3, 4, 5, 0]])


def test_subset_of_a_subset_keeps_one_index():
    store = ArrayImages(RGB)
    one = subset_images(store, [6, 5, 4, 3])
    two = subset_images(one, [3, 0])
    assert two.base is store and two.rows.tolist() == [3, 6]
    assert subset_images(store, range(7)) is store
    assert subset_images(one, range(4)).rows.tolist() == [6, 5, 4, 3]


def test_pairs_and_labelled_subsets():
    ids = np.arange(10, 17)
    places = [f"p{i}" for i in range(7)]
    pairs = Pairs(ArrayImages(RGB), [f"c{i}" for i in range(7)], ids, places)
    part = pairs.subset([5, 2]).subset(np.array([1]))
    assert (part.captions, part.ids.tolist(), part.locations) == (["c2"], [12], ["p2"])
    np.testing.assert_array_equal(part.images.take([0]), RGB[[2]])
    labelled = Labelled(ArrayImages(RGB), np.array([0, 1, 1, 0, 1, 0, 0]), ["a", "b"], ids, places)
    part = labelled.subset([4, 0])
    assert part.labels.tolist() == [1, 0] and part.ids.tolist() == [14, 10]
    assert part.classes == ["a", "b"] and part.num_bad == 0 and len(part) == 2
    with pytest.raises(ValueError, match="captions must have one entry per image, 7, got 1"):
        Pairs(ArrayImages(RGB), ["x"], ids, places)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 1\).* got 1 for p1"):
        Labelled(ArrayImages(RGB), labelled.labels, ["a"], ids, places)
