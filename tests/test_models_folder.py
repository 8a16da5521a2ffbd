"""Loading and saving open_clip models: equal bits, whole folders, plain errors."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from clip_models import (
    IMAGES,
    MODEL_CFG,
    PREPROCESS_CFG,
    assert_same_model,
    config_folder,
    snapshot,
    tiny,
    tiny_config,
)
from dual_encoder import DualEncoder
from torch import nn

from pybackdoor.models import CheckpointError, create, load, read_checkpoint, save
from pybackdoor.models.folder import RECORD

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


@pytest.fixture(scope="module")
def loaded():
    return tiny()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"quick_gelu": True},
        {"custom_text": True},
        {"init_logit_bias": -10.0, "nonscalar_logit_scale": True},
        {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 8}},
    ],
    ids=["vit", "quick_gelu", "custom_text", "siglip_like", "resnet"],
)
def test_save_and_load_give_equal_bits_and_embeddings(tmp_path, changes):
    wanted = tiny(1, **changes)
    folder = save(wanted, tmp_path / "new" / "modèle")
    found = load(folder)
    assert_same_model(found, wanted)
    assert found.config["quick_gelu"] == changes.get("quick_gelu", False)
    assert found.config["source"] == str(folder) and not found.model.training
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS, RECORD]
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1
    assert_same_model(load(f"local-dir:{folder}"), wanted)


def test_open_clip_itself_reads_what_we_save(tmp_path, loaded):
    import open_clip

    model = open_clip.create_model(f"local-dir:{save(loaded, tmp_path / 'm')}")
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert model.visual.preprocess_cfg["mean"] == PREPROCESS_CFG["mean"]
    assert model.visual.preprocess_cfg["resize_mode"] == "squash"


def test_quick_gelu_changes_the_embeddings_and_can_be_overridden(tmp_path, loaded):
    folder = save(loaded, tmp_path / "m")
    quick = load(folder, quick_gelu=True)
    assert quick.config["quick_gelu"] is True and loaded.config["quick_gelu"] is False
    with torch.no_grad():
        change = (quick.model.encode_image(IMAGES) - loaded.model.encode_image(IMAGES)).abs().max()
    assert change > 1e-4
    assert load(save(quick, tmp_path / "q")).config["quick_gelu"] is True


def test_lone_models_need_a_config(tmp_path, loaded):
    with pytest.raises(ValueError, match="save: config must be given"):
        save(loaded.model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
    config = {"model_cfg": MODEL_CFG}  # preprocess_cfg comes from the model
    assert_same_model(load(save(loaded.model, tmp_path / "m", config=config)), loaded)
    compiled = torch.compile(loaded.model, backend="eager")
    assert_same_model(load(save(compiled, tmp_path / "c", config=config)), loaded)
    parallel = SimpleDDP(loaded.model)
    assert_same_model(load(save(parallel, tmp_path / "d", config=loaded.config)), loaded)
    with pytest.raises(ValueError, match="config must hold preprocess_cfg"):
        save(DualEncoder(), tmp_path / "p", config=config)
    with pytest.raises(TypeError, match="must have encode_image"):
        save(nn.Linear(2, 2), tmp_path / "x", config=config)


class SimpleDDP(nn.Module):
    """The shape of DistributedDataParallel: the model under `module`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model


def test_shared_tensors_are_written_under_every_name(tmp_path):
    tied = tiny(2)
    blocks = tied.model.transformer.resblocks
    blocks[1].ln_1.weight = blocks[0].ln_1.weight
    found = read_checkpoint(save(tied, tmp_path / "m") / WEIGHTS)
    assert torch.equal(
        found["transformer.resblocks.0.ln_1.weight"], found["transformer.resblocks.1.ln_1.weight"]
    )
    assert_same_model(load(tmp_path / "m"), tied)


def test_precision_and_device(tmp_path, loaded):
    folder = save(loaded, tmp_path / "m")
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp64", torch.double)):
        model = load(folder, precision=name).model
        for key, value in loaded.model.state_dict().items():
            assert torch.equal(model.state_dict()[key], value.to(dtype))
    exact = load(save(load(folder, precision="fp64"), tmp_path / "d"), precision="fp64")
    assert exact.model.logit_scale.dtype == torch.float64
    with pytest.raises(ValueError, match="load: precision must be one of fp32.*got 'int8'"):
        load(folder, precision="int8")
    for device in ("abacus", "cuda:77"):
        with pytest.raises(ValueError, match=f"device must be usable here, got '{device}'"):
            load(folder, device=device)
    with pytest.raises(ValueError, match="create: precision must be one of"):
        create(tiny_config(), precision="int8")


def test_manifest_and_reports_travel_and_go(tmp_path, loaded):
    manifest = SimpleNamespace(save=lambda path: Path(path).write_text('{"schema": 1}'))
    folder = save(loaded, tmp_path / "m", manifest=manifest, extra_files={"results.json": [1, 2]})
    assert json.loads((folder / "results.json").read_text()) == [1, 2]
    assert json.loads((folder / "manifest.json").read_text()) == {"schema": 1}
    recorded = json.loads((folder / RECORD).read_text())
    assert sorted(recorded["files"]) == ["manifest.json", CONFIG, WEIGHTS, "results.json"]
    (folder / "results.json").write_text("edited by hand")  # reports do not keep a model from use
    load(folder)
    save(loaded, folder)
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS, RECORD]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"manifest": {}}, TypeError, "manifest must be a pybackdoor.manifest.Manifest, got dict"),
        ({"extra_files": {"../x.json": 1}}, ValueError, "extra_files must be named.*'../x.json'"),
        ({"extra_files": {"notes.txt": 1}}, ValueError, "extra_files must be named.*'notes.txt'"),
        ({"extra_files": {CONFIG: 1}}, ValueError, "extra_files must be named.*open_clip_config"),
        ({"extra_files": {"a.json": {1, 2}}}, ValueError, "extra_files\\['a.json'\\] must be JSON"),
        ({"extra_files": {"a.json": float("nan")}}, ValueError, "must be JSON"),
        ({"config": {"model": 1}}, ValueError, "dict with model_cfg.*got keys model"),
    ],
)
def test_what_save_refuses(tmp_path, loaded, options, error, message):
    with pytest.raises(error, match=message):
        save(loaded, tmp_path / "m", **options)
    assert list(tmp_path.iterdir()) == []


def test_nan_weights_are_named_and_neither_saved_nor_loaded(tmp_path, loaded):
    folder = save(loaded, tmp_path / "m")
    broken = copy.deepcopy(loaded.model)
    with torch.no_grad():
        broken.visual.proj[0, 0] = float("nan")
    with pytest.raises(ValueError, match="model to save must be finite, 1 tensors.*visual.proj"):
        save(loaded._replace(model=broken), folder)
    assert_same_model(load(folder), loaded)
    torch.save(broken.state_dict(), tmp_path / "nan.pt")
    with pytest.raises(ValueError, match="nan.pt must be finite.*visual.proj"):
        load(tmp_path / "nan.pt", arch=folder)


def test_foreign_files_stay_and_only_ours_are_replaced(tmp_path, loaded):
    folder = tmp_path / "m"
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "run.txt").write_text("kept")
    (folder / "vocab.json").write_text("kept too")
    for seed in (5, 6):
        wanted = tiny(seed)
        save(wanted, folder)
        assert_same_model(load(folder), wanted)
    after = snapshot(folder)
    assert after["logs/run.txt"] == b"kept" and after["vocab.json"] == b"kept too"
    assert sorted(after) == sorted(["logs/run.txt", "vocab.json", CONFIG, WEIGHTS, RECORD])


def test_a_folder_with_the_other_formats_model_is_refused(tmp_path, loaded):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="must not hold another model's config.json"):
        save(loaded, folder)
    assert sorted(snapshot(folder)) == ["config.json"]


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_flipped_bit_is_refused(tmp_path, loaded, name):
    folder = save(loaded, tmp_path / "m")
    content = bytearray((folder / name).read_bytes())
    content[-40] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is damaged or was changed.*{RECORD} to lo"):
        load(folder)
    (folder / RECORD).unlink()
    if name == WEIGHTS:
        load(folder)  # safetensors alone cannot tell


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "must hold a JSON object"),
        ("[]", "must hold an object, got list"),
        ('{"schema": "other/9", "files": {}}', "schema of .* must be 'pybackdoor.model/1'"),
        ('{"schema": "pybackdoor.model/1", "files": {"../x": "0"}}', "SHA-256 per file name"),
        ('{"schema": "pybackdoor.model/1", "files": 3}', "SHA-256 per file name"),
        ('{"schema": "pybackdoor.model/1", "files": {}}', f"is not listed in {RECORD}"),
    ],
)
def test_a_damaged_record_is_refused_and_saving_repairs_it(tmp_path, loaded, record, message):
    folder = save(loaded, tmp_path / "m")
    (folder / RECORD).write_text(record)
    with pytest.raises(CheckpointError, match=message):
        load(folder)
    save(loaded, folder)
    assert_same_model(load(folder), loaded)


def test_a_folder_of_configuration_alone_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="must hold weights, one of open_clip_model.safe"):
        load(config_folder(tmp_path / "m"))
