"""The pictures of the demo: the embedded set, or the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np

from ..data import Labelled, labelled_from_arrays, labelled_from_csv, labelled_from_folder
from .config import DemoConfig

SIDE = 28  # pixels of a Fashion-MNIST image
BORDER = 2  # of background around it: 32 px, what the demo's image tower takes
COLUMNS = 100  # tiles in a row of a sheet
SHEETS = {"train": ("train.png", 2400), "test": ("test.png", 300)}  # file, images per class
CLASSES = (
    "t-shirt",
    "pair of trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def fashion_mnist(split: str) -> tuple[np.ndarray, np.ndarray]:
    """([N, 32, 32] uint8 grey images, [N] int64 labels) of "train" (24,000) or "test" (3,000)."""
    from PIL import Image

    name, per_class = SHEETS[split]
    with as_file(files(__package__) / name) as path, Image.open(path) as image:
        sheet = np.asarray(image.convert("L"))
    tiles = sheet.reshape(-1, SIDE, COLUMNS, SIDE).transpose(0, 2, 1, 3).reshape(-1, SIDE, SIDE)
    images = np.pad(tiles, ((0, 0), (BORDER, BORDER), (BORDER, BORDER)))
    return images, np.repeat(np.arange(len(CLASSES)), per_class)


@dataclass(frozen=True)
class Pictures:
    """Labelled pictures to train and to test on.

    Attributes:
        train, test: at the demo's image size.
        grey: all three channels are equal, so triggers are grey too.
        mean, std: of each channel of the training pictures, for pixels in [0, 1].
        source: where they come from.
    """

    train: Labelled
    test: Labelled
    grey: bool
    mean: list[float]
    std: list[float]
    source: str

    @staticmethod
    def read(config: DemoConfig) -> Pictures:
        """The user's pictures where the options name them, else the embedded Fashion-MNIST.

        A tenth of the user's own pictures, chosen by the seed, is kept for testing.
        """
        if config.images is None and config.csv is None:
            if config.image_size != SIDE + 2 * BORDER:
                raise ValueError(
                    f"image_size must be {SIDE + 2 * BORDER} for the embedded pictures, got "
                    f"{config.image_size}; give your own with --images or --csv"
                )
            train, test = (
                labelled_from_arrays(*fashion_mnist(split), CLASSES) for split in ("train", "test")
            )
            return Pictures._measured(train, test, "Fashion-MNIST, embedded")
        own = _own(config)
        order = np.random.default_rng([config.seed, 0x74657374]).permutation(len(own))
        tenth = max(1, len(own) // 10)
        train, test = own.subset(np.sort(order[tenth:])), own.subset(np.sort(order[:tenth]))
        if len(train) < 4 * config.batch_size:
            raise ValueError(
                f"the demo needs two halves of at least two batches of {config.batch_size} "
                f"training pictures, got {len(train)} in all: give more, or a smaller --batch-size"
            )
        return Pictures._measured(train, test, str(config.images or config.csv))

    @staticmethod
    def _measured(train: Labelled, test: Labelled, source: str) -> Pictures:
        if len(train.classes) < 2:
            raise ValueError(f"the demo needs at least 2 classes, got {train.classes}")
        pixels = train.images.take(np.arange(0, len(train), max(1, len(train) // 2000))) / 255
        grey = bool((pixels == pixels[..., :1]).all())
        mean, std = pixels.mean((0, 1, 2)), np.maximum(pixels.std((0, 1, 2)), 1e-3)
        return Pictures(train, test, grey, mean.round(4).tolist(), std.round(4).tolist(), source)


def _own(config: DemoConfig) -> Labelled:
    if config.csv is not None:
        if config.images is not None:
            raise ValueError("give --images or --csv, not both")
        return labelled_from_csv(config.csv, image_size=config.image_size)
    path = Path(config.images)
    if path.is_dir():
        return labelled_from_folder(path, image_size=config.image_size)
    if config.labels is None:
        raise ValueError(
            f"--labels is needed beside --images {path}, which is no folder of classes"
        )
    images = np.load(path, allow_pickle=False)
    labels, classes = _labels(Path(config.labels))
    return labelled_from_arrays(images, labels, classes, image_size=config.image_size)


def _labels(path: Path) -> tuple[np.ndarray, list[str]]:
    if path.suffix == ".npy":
        numbers = np.load(path, allow_pickle=False)
        return numbers, [f"class {i}" for i in range(int(numbers.max()) + 1)]
    names = path.read_text(encoding="utf-8").splitlines()
    if not names:
        raise ValueError(f"--labels {path} must hold one label per image, got an empty file")
    classes = sorted(set(names))
    return np.array([classes.index(name) for name in names]), classes
