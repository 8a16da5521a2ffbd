"""The pictures of the demo: the embedded set, or the user's own."""

from __future__ import annotations

from importlib.resources import as_file, files

import numpy as np

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
