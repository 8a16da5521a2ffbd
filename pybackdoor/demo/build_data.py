"""Build the demo's image sheets from Debian's package ``dataset-fashion-mnist``.

    apt-get install dataset-fashion-mnist
    python -m pybackdoor.demo.build_data /usr/share/datasets/fashion-mnist pybackdoor/demo

A sheet is one grey PNG of 28 x 28 px tiles, row by row, sorted by class: the first 2,400 images of
each class of the training set, and the first 300 of each class of the test set.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from pybackdoor.demo.data import CLASSES, COLUMNS, SHEETS, SIDE


def read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of bytes as an array (the format of MNIST)."""
    raw = gzip.decompress(path.read_bytes())
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">u4", count=dimensions, offset=4).astype(int)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def sheet(images: np.ndarray) -> Image.Image:  # [N, 28, 28] uint8, N a multiple of COLUMNS
    """All images side by side, COLUMNS a row."""
    tiles = images.reshape(-1, COLUMNS, SIDE, SIDE).transpose(0, 2, 1, 3)
    return Image.fromarray(np.ascontiguousarray(tiles.reshape(-1, COLUMNS * SIDE)))


def main(source: Path, folder: Path) -> None:
    for split, stem in (("train", "train"), ("test", "t10k")):
        images = read_idx(source / f"{stem}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{stem}-labels-idx1-ubyte.gz")
        name, per_class = SHEETS[split]
        first = [np.flatnonzero(labels == c)[:per_class] for c in range(len(CLASSES))]
        path = folder / name
        sheet(images[np.concatenate(first)]).save(path, optimize=True)
        print(f"{path}: {per_class * len(CLASSES)} images, {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
