"""What `load` takes, what it says to the rest, and the parts that come with a model."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from clip_models import MODEL_CFG, assert_same_model, config_folder, tiny, tiny_config
from PIL import Image

from pybackdoor.models import CheckpointError, Preprocess, Tokenizer, create, load, save
from pybackdoor.models import hub as hub_files


@pytest.fixture(scope="module")
def loaded():
    return tiny()


@pytest.fixture
def architecture(monkeypatch):
    """The tiny model as one of open_clip's named architectures."""
    import open_clip.factory

    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-8", copy.deepcopy(MODEL_CFG))


def test_a_weight_file_with_its_architecture(tmp_path, loaded, architecture):
    path = tmp_path / "epoch_3.pt"
    wrapped = {f"module.{k}": v for k, v in loaded.model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, path)
    folder = config_folder(tmp_path / "config")
    for found in (
        load(path, arch=folder),
        load(str(path), arch="Tiny-8"),
        load("Tiny-8", pretrained=path),
    ):
        for name, value in loaded.model.state_dict().items():
            assert torch.equal(found.model.state_dict()[name], value)
        assert found.config["source"] == str(path)
    assert_same_model(load(save(load(path, arch=folder), tmp_path / "m")), loaded)
    assert load(path, arch="Tiny-8", quick_gelu=True).config["quick_gelu"] is True


def test_an_architecture_alone_has_random_weights(architecture, caplog, recwarn):
    root = logging.getLogger()
    handlers, filters = list(root.handlers), list(root.filters)
    torch.manual_seed(0)
    one = load("Tiny-8")
    torch.manual_seed(0)
    assert_same_model(load("Tiny-8"), one)
    assert not torch.equal(load("Tiny-8").model.visual.proj, one.model.visual.proj)
    assert one.preprocess == Preprocess(size=32)
    assert not caplog.records and not recwarn.list
    assert (root.handlers, root.filters) == (handlers, filters)


def test_a_folder_goes_before_an_architecture(tmp_path, loaded, architecture, monkeypatch):
    save(loaded, tmp_path / "Tiny-8")
    monkeypatch.chdir(tmp_path)
    assert_same_model(load("Tiny-8"), loaded)


def test_the_bin_of_a_folder_is_read_when_there_is_no_safetensors(tmp_path, loaded):
    folder = config_folder(tmp_path / "m")
    torch.save(loaded.model.state_dict(), folder / "open_clip_pytorch_model.bin")
    assert_same_model(load(folder), loaded)
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"<html>rate limit</html>")
    with pytest.raises(CheckpointError, match="open_clip_pytorch_model.bin is an HTML page"):
        load(folder)


def test_weights_of_another_architecture_are_listed(tmp_path, loaded):
    torch.save(loaded.model.state_dict(), tmp_path / "w.pt")
    wide = config_folder(tmp_path / "wide", embed_dim=48)
    with pytest.raises(CheckpointError, match=r"2 of another shape or kind:.*visual.proj \(file"):
        load(tmp_path / "w.pt", arch=wide)
    tower = {k: v for k, v in loaded.model.state_dict().items() if k.startswith("visual.")}
    torch.save({"vision_encoder_state_dict": tower}, tmp_path / "tower.pt")
    with pytest.raises(CheckpointError, match="'vision_encoder_state_dict' is of type"):
        load(tmp_path / "tower.pt", arch=wide)


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        (3, {}, TypeError, "source must be a name or a path, got int"),
        ("ViT-B-33", {}, ValueError, "got 'ViT-B-33'; similar names: .*ViT-B-32"),
        ("zzz", {}, ValueError, "got 'zzz'$"),
        ("./none", {}, FileNotFoundError, "must be a file or folder, ./none is missing"),
        ("/a/b/none.pt", {}, FileNotFoundError, "/a/b/none.pt is missing"),
        ("local-dir:/none", {}, FileNotFoundError, "must be a folder, /none is missing"),
        ("hf-hub:none", {}, ValueError, "hub id must be owner/name, got 'none'"),
        ("hf-hub:a/b", {"arch": "x"}, ValueError, "arch must be left out when source is a hub id"),
        ("a/b", {"pretrained": "x"}, ValueError, "pretrained must be left out .* a hub id"),
        ("local-dir:x", {"arch": "x"}, ValueError, "arch must be left out .* is a folder"),
        ("Tiny-8", {"arch": "x"}, ValueError, "arch must be left out .* an architecture"),
        ("Tiny-8", {"pretrained": "x"}, ValueError, r"weight file or a tag of Tiny-8 \(none\)"),
        ("ViT-B-32", {"pretrained": "x"}, ValueError, r"tag of ViT-B-32 \(openai, laion.*got 'x'"),
        (__file__, {}, ValueError, "arch must name the architecture when source is a file"),
        (__file__, {"arch": "a", "pretrained": "x"}, ValueError, "pretrained goes with"),
        (__file__, {"arch": "ViT-B-33"}, ValueError, "similar names: .*ViT-B-32"),
        (__file__, {"arch": "ViT-B-32"}, CheckpointError, "is a text file"),
    ],
)
def test_sources_that_are_refused(architecture, source, options, error, message):
    with pytest.raises(error, match=message):
        load(source, **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "open_clip_config.json must hold a JSON object"),
        ("{}", "dict with model_cfg, as in open_clip_config.json, got keys none"),
        ('{"model_cfg": {"embed_dim": 3}}', "hold embed_dim, vision_cfg and text_cfg, got keys em"),
        (json.dumps(tiny_config(text_cfg=3)), "hold embed_dim, vision_cfg and text_cfg"),
        (json.dumps(tiny_config(colour=3)), "describe an open_clip model, got .*colour"),
        (json.dumps(tiny_config(embed_dim="x")), "describe an open_clip model"),
        (json.dumps(tiny_config() | {"preprocess_cfg": {"std": [0, 1, 1]}}), "std must be positiv"),
        (
            json.dumps(
                tiny_config(
                    text_cfg={
                        "hf_tokenizer_name": "a",
                        "tokenizer_kwargs": {"trust_remote_code": 1},
                    }
                )
            ),
            r"tokenizer_kwargs of .* must be among .*got \['trust_remote_code'\]",
        ),
    ],
)
def test_damaged_configurations(tmp_path, loaded, content, message):
    folder = config_folder(tmp_path / "m")
    torch.save(loaded.model.state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_create_refuses_what_is_no_json():
    with pytest.raises(ValueError, match="config of create.. must be plain JSON"):
        create(tiny_config() | {"extra": {1, 2}})
    with pytest.raises(ValueError, match="dict with model_cfg.*got list"):
        create([])


def test_a_folder_of_neither_format(tmp_path):
    with pytest.raises(CheckpointError, match="must hold open_clip_config.json .* or config.json"):
        load(tmp_path)


def test_offline_is_told_in_one_sentence(tmp_path):
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from pybackdoor.models import load\n"
        "for name, tag in ('a/b', None), ('hf-hub:a/b', None), ('ViT-B-32', 'openai'):\n"
        "    try: load(name, pretrained=tag)\n"
        "    except ConnectionError as error: print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True,
        cwd=tmp_path,  # the source tree would hide an install
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    assert [line.split()[1] for line in lines] == [
        "a/b", "a/b", "timm/vit_base_patch32_clip_224.openai"
    ]  # fmt: skip
    for line in lines:
        assert "could not be had from the Hugging Face Hub" in line and len(line) < 400
        assert "HF_HUB_OFFLINE is set" in line


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """A hub of local folders: owner/name is a folder below `tmp_path / "hub"`."""
    import huggingface_hub

    root = tmp_path / "hub"
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo_id, **_: str((root / repo_id).resolve())
    )

    def download(repo_id, filename, **_):
        path = root / repo_id / filename
        if not path.exists():
            raise FileNotFoundError(f"404 {filename}\nmore")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return root


def test_a_hub_model_is_read_as_its_folder(fake_hub, loaded):
    save(loaded, fake_hub / "me" / "clip")
    for source in ("me/clip", "hf-hub:me/clip"):
        found = load(source)
        assert_same_model(found, loaded)
        assert found.config["source"] == "me/clip"
    (fake_hub / "me" / "clip" / "open_clip_model.safetensors").unlink()
    with pytest.raises(
        ConnectionError, match=r"me/clip could .* \(404 open_clip_model.safet[^\n]*$"
    ):
        load("me/clip")


def test_sharded_hub_weights_bring_their_shards(fake_hub, monkeypatch):
    (fake_hub / "a" / "b").mkdir(parents=True)
    (fake_hub / "a" / "b" / "model.safetensors.index.json").write_text("{}")
    asked = []
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda **k: asked.append(k) or "x")
    path = hub_files.fetch_weights("a/b", ["model.safetensors", "model.safetensors.index.json"])
    assert path.name == "model.safetensors.index.json"
    assert asked[0]["allow_patterns"] == ["model-*"]


@pytest.mark.parametrize("place", ["me/repo/", "me/repo/weights.bin"])
def test_a_pretrained_tag_brings_weights_activation_and_preprocessing(
    fake_hub, loaded, architecture, monkeypatch, place
):
    import open_clip.pretrained

    quick = tiny(3, quick_gelu=True)
    (fake_hub / "me" / "repo").mkdir(parents=True)
    name = "weights.bin" if place.endswith(".bin") else "open_clip_pytorch_model.bin"
    torch.save(quick.model.state_dict(), fake_hub / "me" / "repo" / name)
    tag = {"hf_hub": place, "quick_gelu": True, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny-8", {"mine": tag, "lost": {"a": 1}})
    with pytest.warns(UserWarning, match=r"Tiny-8 \(mine\) was trained with quick_gelu=True"):
        found = load("Tiny-8", pretrained="mine")
    assert found.config["quick_gelu"] is True and found.preprocess.mean == (0.5, 0.5, 0.5)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(found.model.encode_image(images), quick.model.encode_image(images))
    assert load("Tiny-8", pretrained="mine", quick_gelu=False).config["quick_gelu"] is False
    tag["quick_gelu"] = False  # agrees with the architecture: no warning
    assert load("Tiny-8", pretrained="mine").config["quick_gelu"] is False
    with pytest.raises(ValueError, match="tag with a place on the hub"):
        load("Tiny-8", pretrained="lost", quick_gelu=False)


def test_open_clip_missing_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match="run pip install open_clip_torch"):
        create(tiny_config())


def test_the_tokenizer_honours_context_and_vocabulary(loaded):
    import open_clip

    tokenizer = pickle.loads(pickle.dumps(loaded.tokenizer))
    texts = ["a photo of a cat", "dog " * 40]
    tokens = tokenizer(texts)
    assert torch.equal(tokens, open_clip.get_tokenizer("ViT-B-32")(texts, context_length=16))
    assert tokens.shape == (2, 16) and tokens[1, -1] == 49407  # cut, the end token kept
    assert torch.equal(tokenizer(texts[0]), tokens[:1])
    assert (tokenizer.context_length, tokenizer.vocab_size) == (16, 49408)
    with pytest.raises(TypeError, match=r"texts\[1\] must be a string, got int"):
        tokenizer(["x", 3])
    small = tiny(text_cfg=MODEL_CFG["text_cfg"] | {"vocab_size": 1000}).tokenizer
    with pytest.raises(ValueError, match="below the model's vocab_size 1000, got 49407 for 'cat'"):
        small(["cat"])
    assert (
        Tokenizer(lambda t: torch.zeros(0, 16), context_length=16, vocab_size=9)([]).shape[0] == 0
    )


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("shape", [(40, 61), (61, 40), (32, 32), (20, 25)])
def test_preprocess_equals_open_clips_transform(mode, shape):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    ours = Preprocess(size=32, resize_mode=mode)
    config = ours.to_dict()
    wanted = image_transform_v2(PreprocessCfg(**config), is_train=False)(Image.fromarray(pixels))
    found = torch.from_numpy(ours(Image.fromarray(pixels))).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(config[k])[:, None, None] for k in ("mean", "std"))
    assert torch.equal((found - mean) / std, wanted)
    assert Preprocess.from_dict(json.loads(json.dumps(config))) == ours


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": [32, 48]}, r"size must be one positive integer \(square\), got \[32, 48\]"),
        ({"size": 0}, "size must be"),
        ({"size": True}, "size must be"),
        ({"mean": (1, 2)}, "mean must be three finite numbers"),
        ({"mean": "abc"}, "mean must be three finite numbers, got 'abc'"),
        ({"std": 3}, "std must be three finite numbers"),
        ({"std": (1, 1, float("inf"))}, "std must be three finite numbers"),
        ({"std": (1, 1, 0)}, "std must be positive"),
        ({"interpolation": "random"}, "interpolation must be one of .*got 'random'"),
        ({"resize_mode": "longest"}, "resize_mode must be one of .*got 'longest'"),
    ],
)
def test_preprocess_refuses(arguments, message):
    with pytest.raises(ValueError, match=f"Preprocess: {message}"):
        Preprocess(**arguments)


def test_preprocess_takes_images_of_8_bit_samples_only():
    preprocess = Preprocess(size=[32, 32])
    assert preprocess(Image.new("L", (40, 40), 77)).tolist() == [[[77] * 3] * 32] * 32
    with pytest.raises(TypeError, match="must be a Pillow image, got ndarray"):
        preprocess(np.zeros((32, 32, 3), np.uint8))
    for mode in ("I;16", "I", "F"):
        with pytest.raises(ValueError, match=f"8-bit samples, got mode {mode}"):
            preprocess(Image.new(mode, (40, 40)))
    with pytest.raises(TypeError, match="preprocess_cfg must be a dict, got list"):
        Preprocess.from_dict([])


def test_preprocess_is_read_off_a_model(loaded):
    assert Preprocess.from_model(loaded.model) == loaded.preprocess
    assert Preprocess.from_model(torch.nn.Linear(2, 2)) is None
    tower = types.SimpleNamespace(image_size=32, image_mean=(0.1, 0.2, 0.3), image_std=(1, 1, 1))
    found = Preprocess.from_model(types.SimpleNamespace(visual=tower))
    assert found == Preprocess(size=32, mean=(0.1, 0.2, 0.3), std=(1, 1, 1))


def test_vit_b_32_at_its_real_size(tmp_path):
    torch.manual_seed(0)
    wanted = load("ViT-B-32")
    assert sum(p.numel() for p in wanted.model.parameters()) == 151_277_313
    found = load(save(wanted, tmp_path / "vit"))
    for name, value in wanted.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], value), name
    images, tokens = torch.randn(1, 3, 224, 224), wanted.tokenizer("a photo of a cat")
    with torch.no_grad():
        assert torch.equal(found.model.encode_image(images), wanted.model.encode_image(images))
        assert torch.equal(found.model.encode_text(tokens), wanted.model.encode_text(tokens))
