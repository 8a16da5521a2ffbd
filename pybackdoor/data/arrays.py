"""Pairs and labelled sets in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .labels import label_numbers
from .pairs import Labelled, Pairs, pairs_from_labelled
from .preprocess import Preprocessing, size_pair
from .store import ArrayImages, pixel_array


def labelled_from_arrays(
    images: Any,
    labels: Any,
    classes: Sequence[str],
    *,
    image_size: int | tuple[int, int] | None = None,
    resize_mode: str = "shortest",
    interpolation: str = "bicubic",
) -> Labelled:
    """A labelled set in memory.

    Args:
        images: [N, H, W, 3] or grey [N, H, W], uint8 array or CPU tensor; kept, not copied.
        labels: N integers in [0, len(classes)), or N class names.
        classes: class names.
        image_size: resize to this; None = keep the size.
        resize_mode, interpolation: as in `Preprocessing`.
    Raises:
        TypeError, ValueError: dtype, shape or length, a label not in classes.
    """
    op = "labelled_from_arrays"
    store = _array_store(op, images, image_size, resize_mode, interpolation)
    labels = np.asarray(labels)
    if labels.ndim != 1 or len(labels) != len(store):
        raise ValueError(f"{op}: labels must be [{len(store)}], got {list(labels.shape)}")
    names, numbers = label_numbers(op, labels, classes, lambda i: f"label {i}")
    return Labelled(store, numbers, names, np.arange(len(store)), _array_locations(len(store)))


def pairs_from_arrays(
    images: Any,
    captions: Sequence[str] | None = None,
    *,
    labels: Any = None,
    classes: Sequence[str] | None = None,
    templates: Any = None,
    image_size: int | tuple[int, int] | None = None,
    resize_mode: str = "shortest",
    interpolation: str = "bicubic",
    seed: int = 0,
) -> Pairs:
    """Pairs in memory: images with captions, or with labels, classes and templates.

    Args:
        images, image_size, resize_mode, interpolation: as in `labelled_from_arrays`.
        captions: N strings, none empty.
        labels, classes, templates, seed: instead of captions; see `pairs_from_labelled`.
    Raises:
        TypeError, ValueError: as `labelled_from_arrays`; an empty caption, named by its index.
    """
    op = "pairs_from_arrays"
    by_label = {"labels": labels, "classes": classes, "templates": templates}
    given = [name for name, value in by_label.items() if value is not None]
    if len(given) != (0 if captions is not None else 3):
        got = given + ["captions"] * (captions is not None)
        raise ValueError(
            f"{op}: give captions, or labels with classes and templates; got {got or 'neither'}"
        )
    if captions is None:
        assert classes is not None
        labelled = labelled_from_arrays(
            images, labels, classes, image_size=image_size, resize_mode=resize_mode,
            interpolation=interpolation,
        )  # fmt: skip
        return pairs_from_labelled(labelled, templates, seed)
    store = _array_store(op, images, image_size, resize_mode, interpolation)
    captions = list(captions)
    for index, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise TypeError(f"{op}: caption {index} must be a str, got {type(caption).__name__}")
        if not caption.strip():
            raise ValueError(f"{op}: caption {index} is empty")
    return Pairs(store, captions, np.arange(len(store)), _array_locations(len(store)))


def _array_store(
    op: str,
    images: Any,
    image_size: int | tuple[int, int] | None,
    resize_mode: str,
    interpolation: str,
) -> ArrayImages:
    pixels = pixel_array(images, op)
    if image_size is None:
        return ArrayImages(pixels)
    preprocessing = Preprocessing(size_pair(image_size), resize_mode, interpolation)
    if preprocessing.image_size == pixels.shape[1:3]:
        return ArrayImages(pixels)
    from PIL import Image

    resized = np.empty((len(pixels), *preprocessing.image_size, *pixels.shape[3:]), np.uint8)
    for index, image in enumerate(pixels):
        rgb = preprocessing(Image.fromarray(image))
        resized[index] = rgb if pixels.ndim == 4 else rgb[..., 0]
    return ArrayImages(resized)


def _array_locations(count: int) -> list[str]:
    return [f"array:{index}" for index in range(count)]
