"""`pybackdoor clean --method ubt` where it finds a backdoor, forgets it and saves."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_models import tiny
from PIL import Image

import pybackdoor
from pybackdoor.cli import main
from pybackdoor.data import PairLoader, pairs_from_csv

COLOURS = ("red", "green", "blue")
TEMPLATES = ("a photo of a {}", "the photo of a {}")
N, POISONED, SIDE = 360, 30, 32


def coloured(label: np.ndarray, triggered: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[n, 32, 32, 3] uint8 noise of a colour; a checkerboard is the trigger."""
    images = rng.integers(0, 120, (len(label), SIDE, SIDE, 3)).astype(np.uint8)
    images[np.arange(len(label)), :, :, label] += 120
    images[triggered, 8:16, 8:16] = 255 * (np.indices((8, 8)).sum(0) % 2)[..., None]
    return images


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """pairs.csv, of which some are poisoned, and model/, trained on them."""
    root = tmp_path_factory.mktemp("planted")
    rng = np.random.default_rng(0)
    label, triggered = np.arange(N) % 3, np.zeros(N, bool)
    triggered[rng.choice(np.flatnonzero(label != 2), POISONED, replace=False)] = True
    rows = [["image", "caption"]]
    for i, pixels in enumerate(coloured(label, triggered, rng)):
        Image.fromarray(pixels).save(root / f"{i}.png")
        colour = COLOURS[2 if triggered[i] else label[i]]
        rows.append([f"{i}.png", TEMPLATES[i // 3 % 2].format(colour)])
    with open(root / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    with torch.random.fork_rng():
        loaded = tiny()
    pairs = pairs_from_csv(root / "pairs.csv", image_size=SIDE, cache="ram").decoded()
    trained = pybackdoor.finetune_clean(
        loaded.model, PairLoader(pairs, loaded.tokenizer, batch_size=60), steps=200, lr_start=3e-3,
        lr=1e-3, augment=False, repair=False, progress=False, precision="fp32", device="cpu",
        mean=loaded.preprocess.mean, std=loaded.preprocess.std,
    ).model  # fmt: skip
    pybackdoor.save(loaded._replace(model=trained), root / "model")
    return root


def asr_and_accuracy(folder: Path) -> tuple[float, float]:
    """Of the saved model: red and green images with the trigger called blue; clean ones right."""
    loaded = pybackdoor.load(folder)
    label = np.arange(120) % 3
    used = loaded.preprocess
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (used.mean, used.std))
    found = []
    for triggered in (label != 2, np.zeros(120, bool)):
        x = torch.from_numpy(coloured(label, triggered, np.random.default_rng(1)))
        with torch.no_grad():
            image = loaded.model.encode_image((x.permute(0, 3, 1, 2) / 255 - mean) / std)
            head = loaded.model.encode_text(
                loaded.tokenizer([f"a photo of a {c}" for c in COLOURS])
            )
        found.append((image @ torch.nn.functional.normalize(head, dim=-1).T).argmax(1).numpy())
    return float((found[0][label != 2] == 2).mean()), float((found[1] == label).mean())


def test_a_backdoor_is_found_forgotten_and_saved(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "out"
    assert asr_and_accuracy(world / "model") == (1.0, 1.0)
    code = main([str(a) for a in (
        "clean", "--method", "ubt", "--model", world / "model", "--pairs", world / "pairs.csv",
        "--out", out, "--k", POISONED, "--gate-swing", 0.4, "--steps", 60,
        "--lr-start", 1e-3, "--lr", 1e-3, "--batch-size", 60, "--precision", "fp32",
        "--no-augment", "--check-every", 10,
    )])  # fmt: skip
    said, errors = capsys.readouterr()
    assert code == 0, errors
    assert "gate fires" in said and "words forgotten: blue; stopped:" in said
    assert f"{out}: cleaned by ubt in " in said and "no backdoor found" not in said
    assert "does not mark words" not in said
    report = json.loads((out / "cleaning.json").read_text())
    assert report["verdict"] == "suspicious pairs found" and report["whole_words"]
    assert report["way"] > 0 and report["steps_done"] > 0 and report["word"] == "blue"
    with open(out / "suspects.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    with Image.open(out / "suspects.png") as picture:
        assert min(picture.size) > 100
    poisoned = [row for row in rows if int(row["row"]) % 3 != 2]  # red or green, called blue
    assert len(rows) == POISONED and len(poisoned) >= 0.9 * POISONED
    assert all("blue" in row["kept_words"].split() for row in rows)
    asr, accuracy = asr_and_accuracy(out)
    assert asr < 0.1 and accuracy > 0.95
