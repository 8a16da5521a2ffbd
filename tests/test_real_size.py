"""Models of the size people hold, on JPEGs: an open_clip ViT-B/32 at 224 px, and a CLIPModel."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_models import tiny_hf
from PIL import Image

import pybackdoor
from pybackdoor.cli import main
from pybackdoor.data import PairLoader, pairs_from_arrays
from pybackdoor.models import HFClip


def photographs(count: int) -> list[bytes]:
    """JPEGs: photographs of the pack that PYBACKDOOR_DATA names, else smooth random pictures."""
    pack = Path(os.environ.get("PYBACKDOOR_DATA", "")) / "caltech101_128.npz"
    rng = np.random.default_rng(0)
    found = []
    if pack.is_file():
        with np.load(pack, allow_pickle=False) as z:
            raw, offsets = z["data"], z["offs"]
        chosen = rng.integers(len(offsets) - 1, size=count)
        pictures = [
            Image.open(io.BytesIO(raw[offsets[i] : offsets[i + 1]].tobytes())) for i in chosen
        ]
    else:
        small = rng.integers(0, 256, (count, 9, 12, 3)).astype(np.uint8)
        pictures = [Image.fromarray(s).resize((320, 240), Image.BICUBIC) for s in small]
    for picture in pictures:
        file = io.BytesIO()
        picture.convert("RGB").save(file, "JPEG", quality=88)
        found.append(file.getvalue())
    return found


@pytest.fixture(scope="module")
def pairs_csv(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("jpegs")
    rows = ["image,caption"]
    for i, jpeg in enumerate(photographs(12)):
        (folder / f"{i}.jpg").write_bytes(jpeg)
        rows.append(f"{i}.jpg,picture number {i}")
    (folder / "pairs.csv").write_text("\n".join(rows))
    return folder / "pairs.csv"


def test_two_steps_of_a_vit_b_32_from_a_local_folder(pairs_csv, tmp_path, capsys):
    torch.manual_seed(0)
    pybackdoor.save(pybackdoor.load("ViT-B-32"), tmp_path / "suspect")
    code = main(
        ["clean", "--model", f"local-dir:{tmp_path / 'suspect'}", "--pairs", str(pairs_csv),
         "--steps", "2", "--batch-size", "6", "--precision", "fp32", "--out", str(tmp_path / "out"),
         "--cache-dir", str(tmp_path / "cache"), "--json"]
    )  # fmt: skip
    report = json.loads(capsys.readouterr().out)
    assert code == 0 and report["steps_done"] == 2 and report["pairs_seen"] == 12
    assert report["repair"]["pairs"] == 12  # two steps on these turn hardly anything
    before, after = (pybackdoor.load(tmp_path / name) for name in ("suspect", "out"))
    assert after.preprocess.size == 224 and after.tokenizer(["a cat"]).shape == (1, 77)
    moved = 0
    for name, tensor in after.model.state_dict().items():
        assert tensor.isfinite().all(), name
        moved += not torch.equal(tensor, before.model.state_dict()[name])
    assert moved > 250  # both towers were trained
    assert torch.equal(after.model.logit_scale, before.model.logit_scale)


def test_a_hugging_face_model_is_cleaned_and_saved_in_its_own_form(tmp_path):
    pytest.importorskip("transformers", reason="needs the [hf] extra")
    torch.manual_seed(0)
    model = HFClip(tiny_hf(), pybackdoor.models.Preprocess(size=32))
    rng = np.random.default_rng(0)
    pairs = pairs_from_arrays(
        rng.integers(0, 256, (16, 32, 32, 3)).astype(np.uint8), [str(i) for i in range(16)]
    )

    def tokenizer(texts):  # begin, the number, end, padding
        return torch.tensor([[98, int(t) + 2, 99] + [1] * 13 for t in texts])

    loader = PairLoader(pairs, tokenizer, batch_size=8)
    first, again = (
        pybackdoor.par_clean(model, loader, steps=3, precision="fp32", progress=False)
        for _ in range(2)
    )
    assert torch.equal(first.model.logit_scale, model.logit_scale)
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert any(
        not torch.equal(t, first.model.state_dict()[n]) for n, t in model.state_dict().items()
    )
    pybackdoor.save(first.model, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "clip"
