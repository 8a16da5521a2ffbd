"""The quality matrix's data sets: labelled photographs, decoded once, split by the seed.

CIFAR-10 and Caltech-101 are packs in the folder that PYBACKDOOR_DATA names; Fashion-MNIST is the
demo's own. Test images are the same for every seed, as many of each class: accuracy on them is
macro accuracy.
"""

from __future__ import annotations

import functools
import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pybackdoor.data import ArrayImages, Labelled, Preprocessing, pairs_from_labelled
from pybackdoor.data.pairs import Pairs
from pybackdoor.demo.data import CLASSES, fashion_mnist
from pybackdoor.files import atomic_file

TEMPLATES = (
    "a photo of a {}.",
    "a picture of one {}.",
    "a small photo of the {}.",
    "an image showing a {}.",
    "there is a {} in the photo.",
)
LEFT_OUT = ("BACKGROUND_Google", "Faces_easy")  # no class of its own, and one twice
_SPLIT, _TEST = 0x73706C69, 0x74657374  # keep draws from one seed apart


@dataclass(frozen=True)
class DataSet:
    """What the matrix needs to know of a data set.

    Attributes:
        pack: file in PYBACKDOOR_DATA; None for the demo's own.
        image_size: pixels, a multiple of 32.
        held_out: clean pairs for the defences.
        rebound: further clean pairs, for the training after cleaning. The rest is poisoned.
        test_per_class: images of each class that are evaluated.
        grey: all three channels are equal, so triggers are grey too.
    """

    pack: str | None
    image_size: int
    held_out: int
    rebound: int
    test_per_class: int
    grey: bool = False


@dataclass(frozen=True)
class Split:
    """One seed's parts of a data set: disjoint training images, and what is evaluated."""

    planted: Pairs
    held_out: Pairs
    rebound: Pairs
    test: Labelled
    mean: list[float]
    std: list[float]


def read(spec: DataSet, cache: Path) -> tuple[Labelled, Labelled]:
    """(train, test); what is decoded from a pack is kept in ``cache`` and mapped from there."""
    if spec.pack is None:
        return tuple(_demo(part) for part in ("train", "test"))
    path = pack_path(spec.pack)
    key = f"{path.stem}-{path.stat().st_size}-{spec.image_size}"
    for part in ("train", "test"):
        if not (cache / f"{key}-{part}.npy").exists():
            _decode(path, spec.image_size, cache, key)
    return tuple(_cached(path, cache / f"{key}-{part}.npy", part) for part in ("train", "test"))


def pack_path(name: str) -> Path:
    """Where a pack is.

    Raises:
        FileNotFoundError: PYBACKDOOR_DATA is not set, or its folder lacks the pack.
    """
    folder = os.environ.get("PYBACKDOOR_DATA")
    if not folder:
        raise FileNotFoundError(f"PYBACKDOOR_DATA must name the folder with {name}; it is not set")
    path = Path(folder) / name
    if not path.exists():
        raise FileNotFoundError(f"PYBACKDOOR_DATA: no {name} in {folder}")
    return path


def split(spec: DataSet, train: Labelled, test: Labelled, seed: int) -> Split:
    """The parts for one seed.

    Raises:
        ValueError: fewer training images than the defences take, or too few test images.
    """
    order = np.random.default_rng([seed, _SPLIT]).permutation(len(train))
    kept = spec.held_out + spec.rebound
    if len(order) < kept + 2:
        raise ValueError(f"{spec.pack}: wanted more than {kept} training images, got {len(order)}")
    parts = np.split(order, [spec.held_out, kept])
    held_out, rebound, planted = (
        pairs_from_labelled(train.subset(np.sort(part)), TEMPLATES, seed) for part in parts
    )
    mean, std = pixel_statistics(train)
    return Split(planted, held_out, rebound, balanced(test, spec.test_per_class), mean, std)


def balanced(test: Labelled, per_class: int) -> Labelled:
    """The same number of images of each class, whatever the seed of the run."""
    rng = np.random.default_rng(_TEST)
    chosen = []
    for label, name in enumerate(test.classes):
        rows = np.flatnonzero(test.labels == label)
        if len(rows) < per_class:
            raise ValueError(f"test: wanted {per_class} images of {name!r}, got {len(rows)}")
        chosen.append(rng.choice(rows, per_class, replace=False))
    return test.subset(np.sort(np.concatenate(chosen)))


def pixel_statistics(train: Labelled) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, of pixels in [0, 1]."""
    pixels = train.images.take(np.arange(0, len(train), max(1, len(train) // 2000))) / 255
    return pixels.mean((0, 1, 2)).round(4).tolist(), pixels.std((0, 1, 2)).round(4).tolist()


def _demo(part: str) -> Labelled:
    images, labels = fashion_mnist(part)
    return _labelled(images, labels, list(CLASSES))


def _labelled(images: np.ndarray, labels: np.ndarray, classes: list[str]) -> Labelled:
    rows = np.arange(len(labels))
    return Labelled(ArrayImages(images), labels, classes, rows, [f"array:{i}" for i in rows])


@functools.cache
def _names(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Classes as captions name them, label of each image (-1 = left out), and its split."""
    with np.load(path, allow_pickle=False) as pack:
        names, labels, part = [str(c) for c in pack["classes"]], pack["label"], pack["split"]
    kept = [i for i, name in enumerate(names) if name not in LEFT_OUT]
    number = np.full(len(names), -1)
    number[kept] = np.arange(len(kept))
    return [names[i].replace("_", " ").lower() for i in kept], number[labels], part


def _rows(path: Path, part: str) -> np.ndarray:
    _, labels, parts = _names(path)
    return np.flatnonzero((labels >= 0) & (parts == ("train", "test").index(part)))


def _cached(path: Path, pixels: Path, part: str) -> Labelled:
    classes, labels, _ = _names(path)
    images = np.load(pixels, mmap_mode="r", allow_pickle=False)
    return _labelled(images, labels[_rows(path, part)].astype(np.int64), classes)


def _decode(path: Path, size: int, cache: Path, key: str) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    with np.load(path, allow_pickle=False) as pack:
        raw, offsets = pack["data"].tobytes(), pack["offs"]
    prepared = Preprocessing(size)
    for part in ("train", "test"):
        rows = _rows(path, part)
        pixels = np.empty((len(rows), size, size, 3), np.uint8)
        for at, row in enumerate(rows):
            with Image.open(io.BytesIO(raw[offsets[row] : offsets[row + 1]])) as image:
                pixels[at] = prepared(image)
        with atomic_file(cache / f"{key}-{part}.npy") as file:
            np.save(file, pixels)
