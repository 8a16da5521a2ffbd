"""The files that the cleaning benchmark reads: JPEG photographs with captions, and labelled ones.

LENGTHS is a log-normal curve fitted to what the paper of Conceptual Captions (CC3M; Sharma et al.,
ACL 2018, table of its splits) reports of the words per caption: mean 10.3, standard deviation 4.5,
median 9. The curve's shape is ours; its own figures are 10.1, 4.5 and 9.
"""

from __future__ import annotations

import csv
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

LENGTHS = {  # words: captions of 999
    4: 12, 5: 65, 6: 112, 7: 130, 8: 125, 9: 110, 10: 92, 11: 74, 12: 59, 13: 47, 14: 37, 15: 29,
    16: 22, 17: 18, 18: 14, 19: 11, 20: 9, 21: 7, 22: 5, 23: 4, 24: 3, 25: 3, 26: 2, 27: 2, 28: 2,
    29: 1, 30: 1, 31: 1, 32: 1, 33: 1,
}  # fmt: skip
WORDS = """
a the of in on with and at to for from by is are an his her over under near during after before
man woman person people player team artist actor child girl boy baby dog cat horse bird fish tree
flower garden house home room kitchen bedroom bathroom window door wall floor roof street road
bridge river lake sea beach ocean mountain hill forest field park sky cloud sun moon star snow rain
sunset sunrise night morning summer winter spring autumn city town village country building church
castle tower museum school hotel restaurant shop market station airport car bus train plane boat
bicycle motorcycle truck ship red blue green yellow white black brown pink purple orange golden
silver dark light bright old new young small large big little tall long short high low wide narrow
beautiful colorful vintage modern traditional wooden metal glass stone fresh delicious cold hot
walking running sitting standing playing working smiling looking holding wearing eating drinking
riding swimming flying driving dancing singing waiting sleeping cooking reading writing painting
background illustration vector pattern design texture silhouette portrait photograph landscape
celebration wedding birthday party festival concert performance premiere ceremony football
basketball tennis game match season league championship award dress suit hat shoes bag hair face
hand eye smile food fruit vegetable bread cake coffee tea wine table chair bed lamp book phone
computer camera music dance fashion style business office meeting team leader tourist attraction
biological species industry organization politician celebrity architecture wildlife aerial view
""".split()
PACK = "caltech101_128.npz"
LEFT_OUT = {"BACKGROUND_Google", "Faces_easy"}
QUALITY = 90  # of the JPEG files
PATCH = 16  # pixels of the trigger at 224


class Files(NamedTuple):
    """What was written.

    Attributes:
        pairs: csv with the columns image and caption.
        tests: csv with the columns image and label.
        patch: PNG of the trigger.
        classes: of the labels.
        source: where the pictures come from.
    """

    pairs: Path
    tests: Path
    patch: Path
    classes: tuple[str, ...]
    source: str


def captions(count: int, seed: int, words: int | None = None) -> list[str]:
    """Captions of so many random words each; None: as many as CC3M's have."""
    rng = np.random.default_rng([seed, 1])
    weights = np.array(list(LENGTHS.values()), float)
    sizes = [words] * count
    if words is None:
        sizes = rng.choice(list(LENGTHS), count, p=weights / weights.sum())
    return [" ".join(rng.choice(WORDS, size)) for size in sizes]


def write_files(
    folder: Path,
    *,
    pairs: int,
    tests: int,
    classes: int,
    sides: tuple[int, int],
    seed: int = 0,
    words: int | None = None,
) -> Files:
    """Writes the JPEG files and both tables.

    Args:
        pairs, tests: images of each; drawn with repetition where there are fewer pictures.
        classes: how many of the pictures' classes are kept.
        sides: least and largest width and height in pixels, drawn apart.
        words: of each caption; None: as many as CC3M's have.
    """
    pictures, labels, names, source = _pictures(classes)
    rng = np.random.default_rng([seed, 2])
    order = np.resize(rng.permutation(len(pictures)), pairs + tests)
    sizes = rng.integers(sides[0], sides[1] + 1, (pairs + tests, 2))
    (folder / "images").mkdir(parents=True)

    def write(i: int) -> str:
        from PIL import Image

        name = f"images/{i}.jpg"
        image = pictures[order[i]]
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        else:
            image = Image.fromarray(image)
        width, height = map(int, sizes[i])
        image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC).save(
            folder / name, quality=QUALITY
        )
        return name

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        paths = list(pool.map(write, range(pairs + tests)))
    texts = captions(pairs, seed, words) + [names[labels[i]] for i in order[pairs:]]
    for table, column, rows in (
        ("pairs.csv", "caption", slice(0, pairs)),
        ("tests.csv", "label", slice(pairs, None)),
    ):
        with (folder / table).open("w", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(["image", column])
            lines.writerows(zip(paths[rows], texts[rows], strict=True))
    stripes = np.zeros((PATCH, PATCH, 3), np.uint8)
    stripes[:, ::2] = 255
    from PIL import Image

    Image.fromarray(stripes).save(folder / "patch.png")
    return Files(
        folder / "pairs.csv", folder / "tests.csv", folder / "patch.png", tuple(names), source
    )


def _pictures(classes: int) -> tuple[list, np.ndarray, list[str], str]:
    """(encoded files or [H, W] arrays, labels, class names, source) of the largest classes."""
    folder = os.environ.get("PYBACKDOOR_DATA")
    if folder and (Path(folder) / PACK).exists():
        pack = np.load(Path(folder) / PACK, allow_pickle=False)
        raw, ends, label = pack["data"].tobytes(), pack["offs"], pack["label"]
        names = [str(name) for name in pack["classes"]]
        usable = [c for c, name in enumerate(names) if name not in LEFT_OUT]
        kept = sorted(usable, key=lambda c: -int((label == c).sum()))[:classes]
        rows = np.flatnonzero(np.isin(label, kept))
        images = [raw[ends[i] : ends[i + 1]] for i in rows]
        place = {c: i for i, c in enumerate(kept)}
        words = [names[c].replace("_", " ") for c in kept]
        return images, np.array([place[c] for c in label[rows]]), words, "Caltech-101"
    from pybackdoor.demo.data import CLASSES, fashion_mnist

    images, label = fashion_mnist("test")
    rows = np.flatnonzero(label < classes)
    return [images[i] for i in rows], label[rows], list(CLASSES[:classes]), "Fashion-MNIST"
