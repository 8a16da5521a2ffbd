"""The benchmark of a cleaning run: three trainers of the same loss, and the rows they give."""

import argparse
import os
import statistics
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import _clean_check  # noqa: E402
import _clean_data  # noqa: E402
import _clean_flops  # noqa: E402
import bench_clean  # noqa: E402
import gpu_proof  # noqa: E402
from _clean_published import Augmenting, Published  # noqa: E402
from _clean_setting import Setting, Stages  # noqa: E402
from _clean_tuned import STEP, Tuned, short_text  # noqa: E402
from _common import FIELDS, Report  # noqa: E402
from gpu_waits import waits  # noqa: E402
from pretend_cuda import pretended_gpu  # noqa: E402, F401

SIZE = bench_clean.SIZES["tiny"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYBACKDOOR_DATA", raising=False)
        folder = tmp_path_factory.mktemp("files")
        return _clean_data.write_files(folder, pairs=16, tests=12, classes=3, sides=SIZE.sides)


@pytest.fixture
def setting(files):
    with torch.random.fork_rng():
        loaded = bench_clean.model_of("", tiny=True)
    return Setting(loaded, files, "cpu", SIZE.batch, SIZE.evaluation_batch, "fp32", 0, 1, False)


def test_the_files_are_varied_photographs_with_captions_of_cc3m_lengths(files):
    from PIL import Image

    rows = files.pairs.read_text().splitlines()
    assert rows[0] == "image,caption" and len(rows) == 17 and files.source == "Fashion-MNIST"
    sizes = set()
    for row in rows[1:]:
        with Image.open(files.pairs.parent / row.split(",")[0]) as image:
            assert image.format == "JPEG" and image.mode == "RGB"
            sizes.add(image.size)
    assert len(sizes) > 10 and all(40 <= side <= 64 for size in sizes for side in size)
    lengths = [len(text.split()) for text in _clean_data.captions(4000, 0)]
    assert np.mean(lengths) == pytest.approx(10.1, abs=0.3) and np.median(lengths) == 9
    assert np.std(lengths) == pytest.approx(4.5, abs=0.4)


def test_the_compiling_stage_meets_one_length():
    """Each costs minutes; it is the one that most batches of the other stage are cut to."""
    size, step = bench_clean.SIZES["cuda quick"], STEP[True]
    (stage,) = (s for s in gpu_proof.gpu_stages() if s.name == "clean_compile")
    words = int(stage.command[stage.command.index("--words") + 1])
    tokenize = open_clip.get_tokenizer("ViT-B-32")

    def cut(words):
        lengths = (tokenize(_clean_data.captions(size.pairs, 0, words)) != 0).sum(1)
        return [-(-int(batch.max()) // step) * step for batch in lengths.split(size.batch)]

    (length,) = set(cut(words))
    assert length == statistics.mode(cut(None))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_three_compute_the_same_losses(setting, precision):
    setting.precision = precision
    errors = _clean_check.check_losses(setting)
    assert errors.keys() == {"published", "tuned", "pybackdoor"}
    assert max(errors.values()) < (1e-5 if precision == "fp32" else 1e-2)


def test_a_pair_needs_the_products_of_both_towers_and_of_the_poisoned_image():
    with torch.random.fork_rng():
        model = bench_clean.model_of("", tiny=True).model

    def blocks(tokens, width=32, layers=2):
        each = tokens * width * (3 * width + width + 2 * 4 * width) + 2 * tokens * tokens * width
        return layers * each

    patches = 16 * (3 * 8 * 8) * 32
    image, head = blocks(17), 32 * 32
    text = {n: blocks(n) + head for n in (5, 9)}
    rows = torch.zeros(2, 3, 77, dtype=torch.long)
    rows[0, 1, :5] = rows[1, 0, :9] = rows[1, 2, :2] = 1
    found = _clean_flops.pair_flops(model, 32, rows)
    trained = 3 * (image + head) + 2 * patches  # no gradient of the pixels
    wanted = trained + (image + head + patches) + 3 * (text[5] + text[9]) / 2
    assert found == 2 * wanted
    model = bench_clean.load("RN50").model  # any of the benchmark's
    assert _clean_flops.pair_flops(model, 224, rows) > 40e9


@pytest.mark.parametrize("change", ["weight", "rate"])
def test_a_trainer_of_another_loss_is_refused(setting, monkeypatch, change):
    if change == "weight":  # seen only once the models are apart
        monkeypatch.setattr("_clean_tuned.WEIGHT", 0.0)
        monkeypatch.setattr(_clean_check, "RATE", 1e-3)
    else:
        monkeypatch.setattr("_clean_tuned.rate", lambda step, setting: 3e-3)
    with pytest.raises(ValueError, match="the losses differ"):
        _clean_check.check_losses(setting)


def test_short_captions_have_open_clips_features(setting):
    model = setting.loaded.model
    tokens = setting.tokenizer(["a cat", "two dogs on a red sofa"])
    with torch.no_grad():
        torch.testing.assert_close(short_text(model, tokens[:, :16]), model.encode_text(tokens))


def test_both_augmentations_are_par_s(setting):
    """Noise never darkens, half the images have it; a square of half to one percent is 0."""
    n, side = 200, setting.side
    setting.mean, setting.std = (-1.0,) * 3, (1.0,) * 3  # so that x is in [1, 2] but where erased
    pixels = torch.full((n, side, side, 3), 51, dtype=torch.uint8)
    on_device = Tuned(setting).augmented(pixels, augment=True)
    one = Augmenting(setting, augment=True)
    by_image = torch.stack([one.finish(p.permute(2, 0, 1) / 255) for p in pixels])
    for x in (on_device, by_image):
        erased = x == 0
        assert torch.equal(erased.any(1), erased.all(1))  # all channels
        share = erased[:, 0].flatten(1).float().mean(1)
        assert 0.4 < (share > 0).float().mean() < 0.6
        assert 0.003 < share[share > 0].min() and share.max() < 0.013
        noisy = (x > 1.2 + 1e-5).flatten(1).any(1)
        assert 0.4 < noisy.float().mean() < 0.6 and x[~erased].min() >= 1.2 - 1e-5
        assert x.max() <= 2 + 1e-5
        half = (x[noisy] > 1.2 + 1e-5).float().mean()
        assert 0.45 < half < 0.52  # the noise's negative half is clipped away


def test_evaluations_agree_on_clean_images(setting):
    """The same weights, no augmentation: published and tuned see the same images."""
    setting.augment = False
    shares = [kind(setting).evaluate()[0] for kind in (Published, Tuned)]
    assert shares[0] == pytest.approx(shares[1], abs=1e-6)


def test_stages_are_counted_once():
    stages = Stages("cpu")
    clock = iter(range(0, 100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("_clean_setting.time.perf_counter", lambda: next(clock))
        with stages("outer"):
            with stages("inner"):
                pass
    assert stages.seconds == {"outer": 2, "inner": 1}


def test_the_tiny_run_gives_every_row(files, monkeypatch):
    options = argparse.Namespace(
        rows=None, json=None, repeats=1, tiny=True, quick=False, model="", device="cpu",
        precision=None, compile="auto", workers=0, threads=1, trace=None,
        words=9, modes=["train", "run", "ablation"],
    )  # fmt: skip
    report = Report(options)
    before = dict(os.environ)
    bench_clean.benchmark(options, files, SIZE, report)
    assert dict(os.environ) == before
    found = {(r["provider"], r["mode"], r["case"]): r for r in report.rows}
    trainers = ("published", "tuned", "pybackdoor")
    wanted = {(name, mode, "tiny") for name in trainers for mode in ("train", "run")}
    levers = ("pybackdoor", *(f"without_{lever}" for lever in bench_clean.LEVERS))
    wanted |= {(name, "ablation", "tiny") for name in levers}
    heads = ("pybackdoor", "without_shared_head")
    wanted |= {(name, "ablation", "tiny evaluation") for name in heads}
    assert found.keys() == wanted
    for (name, mode, _), row in found.items():
        assert set(row) == set(FIELDS) and row["kernel"] == "clean" and row["shape"] == "8x32x32x3"
        assert 0 < row["ms_p20"] <= row["ms_median"] <= row["ms_p80"] and "per s" in row["note"]
        assert "captions of 9 words" in row["note"]
        assert row["dtype"] == "float32" and row["precision"] == "fp32"
        if mode == "train":
            assert row["rel_error"] < 1e-5 and row["peak_bytes"] > 0
            assert row["tflops"] > 0 and row["tflops_pct"] > 0
            for stage in ("data", "student", "reference", "loss", "backward", "optimizer"):
                assert f"{stage} " in row["note"], (name, stage)
    assert not list(files.pairs.parent.glob("cache_*"))


@pytest.mark.usefixtures("pretended_gpu")
def test_steps_of_the_tuned_trainer_do_not_wait_for_a_gpu(setting, monkeypatch):
    own = torch.Generator
    of_host = type("Generator", (own,), {"__new__": lambda cls, *_: own.__new__(cls)})
    monkeypatch.setattr(torch, "Generator", of_host)
    setting.device = "cuda"
    trainer = Tuned(setting)
    trainer.read()
    trainer.on_device = None  # no device has a generator here
    images, tokens = next(trainer.ahead([np.arange(8)]))
    with waits() as found:
        for _ in range(3):
            trainer.step(images, tokens, augment=True)
    assert not found and trainer.student.logit_scale.is_cuda
