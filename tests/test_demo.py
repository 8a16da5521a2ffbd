"""The demo's pictures, its story on a small set of one's own, and what it leaves behind."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

import pybackdoor
from pybackdoor.cli import main
from pybackdoor.demo.config import DemoConfig
from pybackdoor.demo.data import CLASSES, Pictures, fashion_mnist


@pytest.fixture(scope="module", autouse=True)
def unpacked_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pybackdoor.demo.data.fashion_mnist", cache(fashion_mnist))
        yield


QUICK = ("--train-steps", "6", "--clean-steps", "4", "--batch-size", "32", "--no-progress")


def test_embedded_pictures_are_complete_and_balanced():
    for split, count, mean in (("train", 24000, 0.219), ("test", 3000, 0.220)):
        images, labels = fashion_mnist(split)
        assert images.shape == (count, 32, 32) and images.dtype == np.uint8
        assert np.bincount(labels).tolist() == [count // 10] * 10
        assert not images[:, :2].any() and not images[:, :, -2:].any()  # the border is background
        assert (images / 255).mean() == pytest.approx(mean, abs=1e-3)
    one = {images[labels == c].mean().round(1) for c in range(10)}
    assert len(one) == 10  # sorted by class: each has its own brightness
    pictures = Pictures.read(DemoConfig())
    assert pictures.grey and pictures.test.classes == list(CLASSES)


def colours(tmp_path, n=480):
    """Two colours as an array and as class folders; the label is the colour."""
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=n)
    images = rng.integers(0, 90, (n, 32, 32, 3)).astype(np.uint8)
    images[np.arange(n), :, :, labels] += 150
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "labels.npy", labels)
    (tmp_path / "labels.txt").write_text("\n".join(["red", "green"][i] for i in labels))
    return images, labels


def test_story_leaves_everything_it_promises(tmp_path, capsys):
    colours(tmp_path)
    out = tmp_path / "out"
    arguments = ["demo", *QUICK, "--images", str(tmp_path / "images.npy"), "--labels",
                 str(tmp_path / "labels.txt"), "--out", str(out), "--trigger", "sig"]  # fmt: skip
    code = main(arguments)
    shown = capsys.readouterr()
    results = json.loads((out / "results.json").read_text())
    assert code == (0 if results["verdict"]["verdict"] == "fires" else 1)
    assert results["schema"] == "pybackdoor.demo/1" and results["trigger"] == "sig"
    assert results["target"] == "green" and results["seconds"] > 0  # sorted: green, red
    for name in ("poisoned", "par", "finetune"):
        found = results["models"][name]
        for key in ("ca", "asr_nontarget", "asr_all", "triggered_accuracy"):
            assert found[key].keys() == {"value", "low", "high", "n"}
            assert 0 <= found[key]["low"] <= found[key]["value"] <= found[key]["high"] <= 1
        assert f"{found['ca']['value']:.1%}" in shown.out
    assert results["models"]["par"]["drift"]["image"]["value"] > 0
    assert (
        results["runs"]["par"]["settings"]["seed"]
        == results["runs"]["finetune"]["settings"]["seed"]
    )
    for name in ("triggered.png", "tradeoff.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 300 and len(picture.convert("RGB").getcolors(1 << 24)) > 50
    cleaned, poisoned = (pybackdoor.load(out / n) for n in ("par", "poisoned"))
    assert torch.equal(cleaned.model.logit_scale, poisoned.model.logit_scale)
    manifest = pybackdoor.Manifest.load(out / "poisoned" / "manifest.json")
    assert manifest.spec.name == "sig" and manifest.preprocess["size"] == 32
    assert "training" in shown.err and "control" in shown.err
    again = main(
        ["demo", "--config", str(out / "config.yaml"), "--out", str(tmp_path / "b"), "--json"]
    )
    repeated = json.loads(capsys.readouterr().out)
    assert again == code and repeated["models"] == results["models"]  # the same bits


def test_own_pictures_as_folders_and_csv_are_the_same_set(tmp_path):
    images, labels = colours(tmp_path, 200)
    rows = ["image,label"]
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        name = ["red", "green"][label]
        (tmp_path / "folders" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "folders" / name / f"{i:03}.png")
        rows.append(f"folders/{name}/{i:03}.png,{name}")
    (tmp_path / "all.csv").write_text("\n".join(rows))
    options = {"batch_size": 32}
    folder = Pictures.read(DemoConfig(images=str(tmp_path / "folders"), **options))
    table = Pictures.read(DemoConfig(csv=str(tmp_path / "all.csv"), **options))
    assert len(folder.train) == len(table.train) == 180 and len(folder.test) == 20
    assert sorted(folder.train.classes) == sorted(table.train.classes) == ["green", "red"]
    assert folder.mean == pytest.approx(table.mean, abs=0.02) and not folder.grey


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--target", "hat"), "target must be one of t-shirt, "),
        (("--trigger", "sticker"), "sticker"),
        (("--tau", "5"), "tau must be in [0, 4]"),
        (("--lr", "-1"), "lr must be a learning rate"),
        (("--rate", "1.5"), "rate must be in (0, 1], got 1.5"),
        (("--image-size", "64"), "image_size must be 32 for the embedded pictures, got 64"),
        (("--images", "a", "--csv", "b"), "--images or --csv, not both"),
        (("--images", "a.npy"), "--labels is needed beside --images a.npy"),
        (("--batch-size", "0"), "batch_size"),
        (("--device", "warp"), "warp"),
    ],
)
def test_bad_options_fail_in_one_line(arguments, message, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "o"), *QUICK, *arguments]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("pybackdoor demo: error:") and message in err


def test_too_few_pictures_are_refused(tmp_path, capsys):
    colours(tmp_path, 100)
    (tmp_path / "empty.txt").write_text("")
    base = ["demo", *QUICK, "--out", str(tmp_path / "o"), "--images", str(tmp_path / "images.npy")]
    assert main([*base, "--labels", str(tmp_path / "labels.npy")]) == 2
    assert "two halves of at least two batches of 32 training pictures, got 90" in (
        capsys.readouterr().err
    )
    assert main([*base, "--labels", str(tmp_path / "empty.txt")]) == 2
    assert "one label per image, got an empty file" in capsys.readouterr().err
