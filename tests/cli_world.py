"""A small model, class folders of JPEGs and tables over them, for tests of the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from clip_models import tiny_config
from PIL import Image

from pybackdoor.models import create, save

COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}


def make_world(root: Path) -> Path:
    """model/, images/<class>/, pairs.csv and test.csv below root."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = create(tiny_config())
    save(fresh, root / "model")
    rng = np.random.default_rng(0)
    rows = []
    for name, colour in COLOURS.items():
        (root / "images" / name).mkdir(parents=True)
        for i in range(16):
            noise = rng.integers(-25, 25, (40, 36, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            path = root / "images" / name / f"{i}.jpg"
            Image.fromarray(pixels).save(path, quality=92)
            rows.append((path.relative_to(root), name))
    pairs = [f"{path},a photo of a {name}." for path, name in rows]
    (root / "pairs.csv").write_text("\n".join(["image,caption", *pairs]))
    (root / "test.csv").write_text("\n".join(["image,label", *(f"{p},{n}" for p, n in rows)]))
    return root


def cleaning(world: Path, out: Path, *more: object) -> tuple:
    """Arguments of a short clean."""
    return ("clean", "--model", world / "model", "--pairs", world / "pairs.csv", "--out", out,
            "--steps", 3, "--batch-size", 16, "--precision", "fp32", *more)  # fmt: skip
