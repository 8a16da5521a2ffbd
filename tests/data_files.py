"""Image files, folders and tables that the data tests read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """[height, width, 3] uint8: smooth enough for JPEG, different for each seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    return np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))


def write_image(path: Path, height: int = 20, width: int = 24, seed: int = 0, **save) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(height, width, seed)).save(path, **save)
    return path


def cut(path: Path, share: float = 1 / 3) -> Path:
    """Keep only the first part of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def image_table(folder: Path, count: int, name: str = "pairs.csv") -> Path:
    """count PNG images and an image,caption table."""
    rows = ["image,caption"]
    for i in range(count):
        write_image(folder / f"{i}.png", seed=i)
        rows.append(f"{i}.png,caption {i}")
    table = folder / name
    table.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return table
