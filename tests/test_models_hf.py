"""Hugging Face CLIPModel folders through the adapter (`[hf]` extra)."""

from __future__ import annotations

import copy
import json
import sys
import types

import pytest
import torch

pytest.importorskip("transformers", reason="needs the [hf] extra: pip install 'pybackdoor[hf]'")

from clip_models import MODEL_CFG, snapshot, tiny, tiny_hf, tokenizer_files
from dual_encoder import DualEncoder

from pybackdoor.models import (
    CheckpointError,
    HFClip,
    Preprocess,
    check_clip,
    load,
    logit_scale_parameters,
    save,
    scale,
)
from pybackdoor.models.folder import RECORD
from pybackdoor.models.hf import library

TOKENS = torch.tensor([[98, 5, 6, 99, 1, 1], [98, 7, 99, 1, 1, 1]])
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hf_folder(tmp_path):
    """A folder as transformers writes it, with a tokenizer."""
    torch.manual_seed(0)
    model = tiny_hf()
    model.save_pretrained(tmp_path / "hf")
    return tokenizer_files(tmp_path / "hf"), model


def assert_same(found, wanted) -> None:
    assert list(found.state_dict()) == list(wanted.state_dict())
    for name, value in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_load_save_load_gives_equal_bits_and_embeddings(hf_folder, tmp_path):
    folder, model = hf_folder
    loaded = load(folder)
    assert_same(loaded.model.model, model)
    saved = save(loaded, tmp_path / "new")
    again = load(saved)
    assert_same(again.model, loaded.model)
    with torch.no_grad():
        output = model(input_ids=TOKENS, pixel_values=IMAGES)
        image_BD, text_BD, factor = again.model(IMAGES, TOKENS)
        torch.testing.assert_close(image_BD, output.image_embeds, rtol=0, atol=0)
        torch.testing.assert_close(text_BD, output.text_embeds, rtol=0, atol=0)
        torch.testing.assert_close(factor * image_BD @ text_BD.T, output.logits_per_image)
    texts = ["ab", "c d"]
    assert torch.equal(again.tokenizer(texts), loaded.tokenizer(texts))
    assert again.tokenizer(texts)[:, :4].tolist() == [[98, 0, 50, 99], [98, 51, 52, 99]]
    assert again.preprocess == loaded.preprocess == Preprocess(size=32)
    assert again.config["quick_gelu"] is True and again.config["format"] == "hf"
    assert not again.model.training


def test_transformers_reads_what_we_save(hf_folder, tmp_path):
    from transformers import CLIPModel

    folder, model = hf_folder
    saved = save(load(folder), tmp_path / "new")
    assert_same(CLIPModel.from_pretrained(saved), model)
    record = json.loads((saved / RECORD).read_text())
    assert record["format"] == "hf" and record["quick_gelu"] is True
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= set(record["files"])


def test_the_adapter_follows_the_protocol(hf_folder):
    model = HFClip(hf_folder[1])
    check_clip(model)
    (parameter,) = logit_scale_parameters(model)
    assert parameter is model.model.logit_scale
    torch.testing.assert_close(scale(model), parameter.detach().exp())
    assert (model.context_length, model.visual.image_size) == (16, 32)
    assert Preprocess.from_model(model) == Preprocess(size=32)
    assert all(name.startswith("model.") for name in model.state_dict())
    duplicate = copy.deepcopy(model)
    assert logit_scale_parameters(duplicate)[0] is duplicate.model.logit_scale


def test_both_kinds_of_transformers_output_are_read():
    """Version 4 returns rows from get_image_features, version 5 an output with pooler_output."""

    class Inner(torch.nn.Module):
        config = tiny_hf().config
        logit_scale = torch.tensor(1.0)

        def get_image_features(self, pixel_values):
            return pixel_values.mean((2, 3))

        def get_text_features(self, input_ids):
            return types.SimpleNamespace(pooler_output=input_ids.float())

    model = HFClip(Inner())
    assert torch.equal(model.encode_image(IMAGES), IMAGES.mean((2, 3)))
    assert torch.equal(model.encode_text(TOKENS), TOKENS.float())


def test_lone_adapters_save_without_a_config(hf_folder, tmp_path):
    model = HFClip(hf_folder[1], Preprocess(size=32, mean=(0.1, 0.2, 0.3), resize_mode="squash"))
    saved = tokenizer_files(save(model, tmp_path / "new"))
    found = load(saved)
    assert_same(found.model, model)
    assert found.preprocess.mean == (0.1, 0.2, 0.3) and found.preprocess.resize_mode == "squash"
    with pytest.raises(TypeError, match="wrap a transformers.CLIPModel"):
        save(hf_folder[1], tmp_path / "raw")


def test_openais_tokenizer_stands_in_for_missing_files(tmp_path):
    import open_clip

    words = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    tiny_hf(**words).save_pretrained(tmp_path / "m")
    found = load(tmp_path / "m").tokenizer(["a photo of a cat"])
    assert torch.equal(found, open_clip.get_tokenizer("ViT-B-32")("a photo of a cat")[:, :16])


def test_an_open_clip_model_keeps_its_hugging_face_tokenizer(tmp_path, monkeypatch):
    """As SigLIP has: hf_tokenizer_name in the configuration, its files from the hub."""
    from open_clip import tokenizer as tokenizers

    (tmp_path / "hub").mkdir()
    tokenizer_files(tmp_path / "hub")
    (tmp_path / "hub" / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    asked, real = [], tokenizers.HFTokenizer

    def from_hub(name, **options):
        asked.append((name, options.pop("trust_remote_code")))
        return real(tmp_path / "hub", **options)

    monkeypatch.setattr(tokenizers, "HFTokenizer", from_hub)
    words = {"hf_tokenizer_name": "me/words", "tokenizer_kwargs": {"clean": "whitespace"}}
    loaded = tiny(text_cfg=MODEL_CFG["text_cfg"] | words | {"vocab_size": 100})
    tokens = loaded.tokenizer(["ab", "c d"])
    assert asked == [("me/words", False)] and tokens.shape == (2, 16)
    assert tokens[:, :4].tolist() == [[98, 0, 50, 99], [98, 51, 52, 99]]
    found = load(save(loaded, tmp_path / "m"))
    assert torch.equal(found.tokenizer(["ab", "c d"]), tokens) and len(asked) == 1
    monkeypatch.setattr(tokenizers, "HFTokenizer", lambda *a, **k: 1 / 0)
    with pytest.raises(ValueError, match=r"needs the tokenizer me/words, .* \(division by zero\)"):
        tiny(text_cfg=MODEL_CFG["text_cfg"] | words)


def test_shards_and_pickled_weights(hf_folder):
    folder, model = hf_folder
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert_same(load(folder).model.model, model)
    saved = save(load(folder), folder)  # our one file goes before the old shards
    assert_same(load(saved).model.model, model)
    for path in [*folder.glob("*.safetensors"), index, folder / RECORD]:
        path.unlink()
    positions = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    torch.save(model.state_dict() | positions, folder / "pytorch_model.bin")
    assert_same(load(folder).model.model, model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "siglip"}, "model_type in .*config.json must be 'clip', got 'siglip'"),
        ({"vision_config": {"hidden_act": "no_such"}}, "must describe a CLIPModel, got .*no_such"),
        ({"projection_dim": 48}, "2 of another shape or kind: .*visual_projection.weight"),
        ({"text_config": {"num_hidden_layers": 3}}, "missing in the file: text_model.encoder.lay"),
    ],
)
def test_configurations_that_do_not_fit(hf_folder, change, message):
    folder, _ = hf_folder
    config = json.loads((folder / "config.json").read_text())
    for name, value in change.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_members_of_the_configuration_that_fetch_code_are_dropped(hf_folder, monkeypatch):
    folder, model = hf_folder
    seen = []
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "evil.py"}, "_attn_implementation": "me/kernel"}
    config["text_config"]["attn_implementation"] = "me/kernel"
    config["quantization_config"] = {"quant_method": "me"}
    (folder / "config.json").write_text(json.dumps(config))
    real = library(folder).CLIPConfig.from_dict

    def recorded(config, **options):
        seen.append(json.dumps(config))
        return real(config, **options)

    monkeypatch.setattr(library(folder).CLIPConfig, "from_dict", recorded)
    assert_same(load(folder).model.model, model)
    assert not any(word in seen[0] for word in ("evil", "kernel", "quant_method"))


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, Preprocess(size=32)),
        (
            {"size": 32, "crop_size": 32, "resample": 2},
            Preprocess(size=32, interpolation="bilinear"),
        ),
        (
            {"size": {"shortest_edge": 32}, "image_mean": [0.5] * 3},
            Preprocess(size=32, mean=[0.5] * 3),
        ),
        (
            {"size": {"height": 32, "width": 32}, "do_center_crop": False},
            Preprocess(size=32, resize_mode="squash"),
        ),
    ],
)
def test_preprocessor_files(hf_folder, settings, wanted):
    (hf_folder[0] / "preprocessor_config.json").write_text(json.dumps(settings))
    assert load(hf_folder[0]).preprocess == wanted
    assert Preprocess.from_hf(wanted.to_hf(), size=32) == wanted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resample": 1}, r"resample must be one of \[2, 3\], got 1"),
        ({"size": {"shortest_edge": 224}}, "size must be the model's 32, got 224"),
        ({"size": {"height": 32, "width": 48}}, "size must be one positive integer"),
        ({"image_std": [0, 0, 0]}, "std must be positive"),
    ],
)
def test_preprocessor_files_that_do_not_fit(hf_folder, settings, message):
    (hf_folder[0] / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"Preprocess: {message}"):
        load(hf_folder[0])


def test_what_an_hf_folder_refuses(hf_folder, tmp_path):
    folder, _ = hf_folder
    with pytest.raises(ValueError, match="quick_gelu must be left out for a Hugging Face model"):
        load(folder, quick_gelu=True)
    (folder / "vocab.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer files in .* cannot be read"):
        load(folder)
    (folder / "vocab.json").unlink()
    with pytest.raises(ValueError, match="must hold tokenizer files .*vocabulary of 100 is not"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="must hold weights, one of model.safetensors"):
        load(folder)
    with pytest.raises(TypeError, match="must be a transformers.CLIPModel with get_image_features"):
        HFClip(DualEncoder())


def test_a_changed_preprocessor_file_is_refused(hf_folder, tmp_path):
    saved = save(load(hf_folder[0]), tmp_path / "new")
    path = saved / "preprocessor_config.json"
    path.write_text(path.read_text().replace("0.48", "0.49"))
    with pytest.raises(CheckpointError, match="preprocessor_config.json is damaged or was changed"):
        load(saved)
    path.unlink()
    with pytest.raises(CheckpointError, match="preprocessor_config.json is missing, though"):
        load(saved)


def test_formats_replace_each_other_only_where_both_are_ours(hf_folder, tmp_path):
    theirs, ours = load(hf_folder[0]), tiny()
    folder = save(ours, tmp_path / "m")
    save(theirs, folder)
    assert_same(load(folder).model, theirs.model)
    save(ours, folder)
    assert load(folder).config["format"] == "open_clip"
    assert sorted(snapshot(folder)) == [
        "open_clip_config.json", "open_clip_model.safetensors", RECORD
    ]  # fmt: skip
    with pytest.raises(ValueError, match="must not hold another model's config.json"):
        save(ours, hf_folder[0])


@pytest.mark.parametrize("shown", [False, True])
def test_the_progress_bar_setting_comes_back(hf_folder, tmp_path, shown, capfd):
    bars = library("").utils.logging
    before = bars.is_progress_bar_enabled()
    try:
        (bars.enable_progress_bar if shown else bars.disable_progress_bar)()
        save(HFClip(hf_folder[1]), tmp_path / "new")
        assert bars.is_progress_bar_enabled() is shown
        assert "Writing" not in capfd.readouterr().err
    finally:
        (bars.enable_progress_bar if before else bars.disable_progress_bar)()


def test_transformers_missing_is_told(hf_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"hf is a Hugging Face CLIPModel.*'pybackdoor\[hf\]'"):
        load(hf_folder[0])
