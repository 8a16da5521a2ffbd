"""The quality matrix's data sets and its report."""

import dataclasses
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import _quality_data  # noqa: E402
import _quality_drift  # noqa: E402
import _quality_report as report  # noqa: E402
from _quality_cells import INSTALLED, NO_ATTACK, NOT_INSTALLED, Work  # noqa: E402
from _quality_data import DataSet  # noqa: E402
from _quality_models import ARCHITECTURES  # noqa: E402
from _quality_picture import taus  # noqa: E402
from _quality_setting import FULL, Cell, Model  # noqa: E402

CLASSES = ("BACKGROUND_Google", "Faces_easy", "wild_cat", "Ant", "cup")


def png(colour):
    out = io.BytesIO()
    Image.new("RGB", (40, 48), colour).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def pack(tmp_path, monkeypatch):
    """A folder with a pack of 20 training and 5 test images of each class, red tells the class."""
    labels = np.repeat(np.arange(5), 25)
    files = [png((40 * label, i, 0)) for i, label in enumerate(labels)]
    np.savez(
        tmp_path / "small.npz",
        data=np.frombuffer(b"".join(files), np.uint8),
        offs=np.cumsum([0, *map(len, files)]),
        label=labels.astype(np.int16),
        split=np.tile(np.repeat([0, 1], [20, 5]), 5).astype(np.int8),
        classes=np.array(CLASSES),
    )
    monkeypatch.setenv("PYBACKDOOR_DATA", str(tmp_path))
    return DataSet("small.npz", 32, 20, 10, 4)


def test_a_pack_is_split_by_the_seed_and_tested_on_the_same_images(pack, tmp_path):
    train, test = _quality_data.read(pack, tmp_path / "cache")
    assert train.classes == ["wild cat", "ant", "cup"] and len(train) == 60 and len(test) == 15
    red = test.images.take(np.arange(15))[:, 16, 16, 0]
    assert (np.abs(red.astype(int) - 40 * (test.labels + 2)) <= 1).all()
    first, second = (_quality_data.split(pack, train, test, seed) for seed in (0, 1))
    rows = [set(p.ids.tolist()) for p in (first.planted, first.held_out, first.rebound)]
    assert [len(r) for r in rows] == [30, 20, 10] and set.union(*rows) == set(range(60))
    assert set(second.held_out.ids) != rows[1]
    assert (first.test.ids == second.test.ids).all()
    assert np.bincount(first.test.labels).tolist() == [4, 4, 4]
    assert first.mean[0] == pytest.approx(120 / 255, abs=0.01)
    for row in (0, 29):
        name = train.classes[train.labels[first.planted.ids[row]]]
        assert f" {name}" in first.planted.captions[row]
    again, _ = _quality_data.read(pack, tmp_path / "cache")  # from the cache
    assert (again.images.take(np.arange(60)) == train.images.take(np.arange(60))).all()


def test_data_that_is_missing_or_too_small_is_named(pack, tmp_path, monkeypatch):
    train, test = _quality_data.read(pack, tmp_path / "cache")
    with pytest.raises(ValueError, match="wanted more than 60 training images, got 60"):
        _quality_data.split(DataSet("small.npz", 32, 40, 20, 4), train, test, 0)
    with pytest.raises(ValueError, match="wanted 6 images of 'wild cat', got 5"):
        _quality_data.balanced(test, 6)
    with pytest.raises(FileNotFoundError, match="no other.npz in"):
        _quality_data.pack_path("other.npz")
    monkeypatch.delenv("PYBACKDOOR_DATA")
    with pytest.raises(FileNotFoundError, match="PYBACKDOOR_DATA must name the folder"):
        _quality_data.pack_path("small.npz")


@pytest.mark.parametrize(("name", "size"), [("resnet", 32), ("resnet", 64), ("vit", 32)])
def test_architectures_take_their_size_and_are_fixed_by_the_seed(name, size):
    import torch

    first, same, other = (
        ARCHITECTURES[name].make(size, [0.5] * 3, [0.2] * 3, seed).model for seed in (0, 0, 1)
    )
    assert first.visual.image_size in (size, (size, size))
    if name == "resnet":
        stem = first.visual.conv1(torch.zeros(1, 3, size, size))
        assert stem.shape[2:] == (32, 32)
    image = torch.rand(2, 3, size, size)
    with torch.no_grad():
        a, b, c = (m.eval().encode_image(image) for m in (first, same, other))
    assert a.shape == (2, 64) and torch.equal(a, b) and not torch.allclose(a, c)


def estimate(value, n=100):
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": n}


def row(attack, defence, seed, ca, asr=None, status=INSTALLED):
    made = {
        "data": "cifar10", "arch": "resnet", "attack": attack, "defence": defence, "seed": seed,
        "rate": 0.01, "status": status, "ca": estimate(ca), "pairs": 10, "cpu_seconds": 4.0,
        "settings": {},
    }  # fmt: skip
    if defence != "none":
        drift = {"image": 1.0, "text": 2.0, "old_images": 0.3, "old_texts": 0.4}
        drift["reference_ca"] = 0.31
        made["drift"] = {name: estimate(value) for name, value in drift.items()}
        made["repair"] = {"image_before": 1.5, "text_before": 2.5}
        made["repair"] |= {"cosine_difference": 1e-7, "logit_difference": 2e-6}
        made["probe"] = {"old": 0.6, "new": 0.2}
    if asr is not None:
        made |= {"asr_nontarget": estimate(asr), "triggered_accuracy": estimate(0.5)}
    if status == INSTALLED:
        made["rebound"] = {"highest": asr + 0.2}
    return made


ROWS = [
    row("clean", "none", 0, 0.8, status=NO_ATTACK),
    row("clean", "par", 0, 0.7, status=NO_ATTACK),
    row("sig", "none", 0, 0.8, 1.0),
    row("sig", "none", 1, 0.7, 0.9),
    row("sig", "par", 0, 0.7, 0.2),
    row("sig", "par", 1, 0.6, 0.4),
    row("sig", "par_tau_2.15", 0, 0.65, 0.3),
    row("wanet", "none", 0, 0.8, 0.4, NOT_INSTALLED),
    {k: v for k, v in row("wanet", "par", 0, 0.0, status=NOT_INSTALLED).items() if k != "ca"},
]


@pytest.fixture
def work(tmp_path):
    """A work folder of these rows, and of one whose settings are not today's."""
    work = Work(tmp_path, FULL, "cpu")
    (tmp_path / "cells").mkdir()
    for made in ROWS:
        model = Model(made["data"], made["arch"], made["attack"], made["seed"])
        work.cell_file(Cell(model, made["defence"])).write_text(json.dumps(made))
    stale = row("sig", "finetune", 0, 0.1, 0.1)
    (tmp_path / "cells" / "cifar10-resnet-sig-s0-0-finetune-0.json").write_text(json.dumps(stale))
    forgotten = row("sig", "prayer", 0, 0.1, 0.1)
    (tmp_path / "cells" / "x.json").write_text(json.dumps(forgotten))
    return work


def test_an_earlier_report_gives_its_cells_back(work, tmp_path):
    out = tmp_path / "out"
    report.write_report(work, out)
    elsewhere = Work(tmp_path / "elsewhere", FULL, "cpu")
    assert report.adopt(elsewhere, tmp_path / "nothing") == 0
    assert report.adopt(elsewhere, out) == len(ROWS) and report.adopt(elsewhere, out) == 0
    before = json.loads(report.results_file(out).read_text())
    report.write_report(elsewhere, out)
    assert json.loads(report.results_file(out).read_text()) == before

    longer = dataclasses.replace(FULL, rebound_at=(100, 200))
    assert report.adopt(Work(tmp_path / "other", longer, "cpu"), out) == 0


def test_rows_of_an_earlier_version_stay_marked_until_they_are_computed_anew(work, tmp_path):
    out, longer = tmp_path / "out", dataclasses.replace(FULL, rebound_at=(100, 200))
    report.write_report(work, out)
    changed = Work(tmp_path / "changed", longer, "cpu")
    (changed.folder / "cells").mkdir(parents=True)
    fresh = [made for made in ROWS if made["defence"] == "par" and made["attack"] == "sig"][:1]
    for made in fresh:
        model = Model(made["data"], made["arch"], made["attack"], made["seed"])
        path = changed.cell_file(Cell(model, made["defence"]))
        path.write_text(json.dumps({**made, "ca": estimate(0.9)}))
    report.write_report(changed, out)
    rows = json.loads(report.results_file(out).read_text())["rows"]
    assert len(rows) == len(ROWS)
    todays = [r for r in rows if "outdated" not in r]
    assert [(r["defence"], r["seed"], r["ca"]["value"]) for r in todays] == [("par", 0, 0.9)]
    page = (out / "docs/quality.md").read_text()
    assert f"Groups marked † hold, {len(ROWS) - 1} in all" in page
    assert "| 10 | 4 | 2 † |" in page and "| 10 | 4 | 1 † |" in page
    assert "After repair, over 1 cleaned models" in page
    before = report.results_file(out).read_text()
    report.write_report(changed, out)
    assert report.results_file(out).read_text() == before


def test_the_report_means_over_seeds_and_leaves_out_what_is_stale(work, tmp_path):
    written = report.write_report(work, tmp_path / "out")
    results = json.loads((tmp_path / "out/benchmarks/results/quality.json").read_text())
    assert len(results["rows"]) == len(ROWS) and results["schema"] == report.SCHEMA
    assert results["machine"]["torch"] and results["settings"]["defences"]["par"]["steps"] == 300
    losses = {(r["attack"], r["defence"], r["seed"]): r["control_ca_loss"] for r in results["rows"]}
    assert losses["sig", "par", 0] == pytest.approx(0.31 - 0.7)  # of the model that was cleaned
    assert losses["sig", "none", 0] == 0 and losses["sig", "par", 1] is None
    page = (tmp_path / "out/docs/quality.md").read_text()
    assert "| sig (t) | 95.0 (75.0) | 30.0 (65.0) | 30.0 (65.0) |" in page
    assert "| clean | (80.0) | (70.0) | - |" in page
    assert "| wanet | attack did not install | attack did not install | - |" in page
    full = "| sig (t) | 1 | par | 65.0 [50.0, 80.0] | 30.0 [10.0, 50.0] | 50.0 [40.0, 60.0] | "
    assert (
        full + "1.50 / 2.50 | 1.00 / 2.00 | 30.0 / 40.0 | 20.0 (60.0) | 50.0 | -39.0 | 10 | 4 | 2 |"
        in page
    )
    assert "more than 1e-07 (logits: 2e-06)" in " ".join(page.split())
    below = (
        "Old images from -40.0 to -30.0 points of the cleaned model's own CA (-36.2 on average), "
        "0 of 4 at most 2 below; 4 of 4 at most 2 below the lower of its CA and that of the model "
        "which they were stored from"
    )
    whose = "over 4 cleaned models (rows without †)"
    assert f"After repair, {whose}. {below}. Old class texts from" in page
    assert "Models that fall further behind by either: 4 of cifar10, resnet." in page
    assert "| wanet | 1 | none | 80.0 [70.0, 90.0] | 40.0 [30.0, 50.0] |" in page
    assert "| 0 of 1 |" in page and "finetune" not in page
    pictures = [path for path in written if path.suffix == ".png"]
    assert [path.name for path in pictures] == ["cifar10-resnet.png"]
    with Image.open(pictures[0]) as picture:
        assert picture.width == 675 and pictures[0].stat().st_size < 60_000
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 4


def test_the_curve_is_par_by_rising_tau():
    assert list(taus().items()) == [
        ("par_tau_0.6", 0.6), ("par", 1.0), ("par_tau_1.5", 1.5), ("par_tau_2.15", 2.15)
    ]  # fmt: skip


def test_a_probe_is_trained_on_the_old_embeddings_and_judged_on_the_other_half(monkeypatch):
    labels = np.arange(80) % 4 // 2
    rng = np.random.default_rng(0)
    old = torch.from_numpy(np.stack([labels, 1 - labels], 1) + 0.05 * rng.normal(size=(80, 2)))
    made = iter([old, old.flip(1)])
    reader = SimpleNamespace(images=lambda *_: next(made))
    monkeypatch.setattr(_quality_drift, "FeatureReader", lambda *_: reader)
    test = SimpleNamespace(images=None, ids=None, labels=labels, classes=["a", "b"])
    assert _quality_drift.probe(None, None, test, None) == {"old": 1.0, "new": 0.0}
    x = torch.randn(40, 3, dtype=torch.float64)
    y = torch.arange(40) % 3
    weights = _quality_drift.fitted(x, y, 3)
    one_hot, ridge = torch.nn.functional.one_hot(y, 3).double(), 1e-2 * 40 / 4
    gradient = _quality_drift.affine(x).T @ (_quality_drift.affine(x) @ weights - one_hot)
    torch.testing.assert_close(gradient, -ridge * weights)  # where the loss with its ridge is least
