"""Weight files: what they are told to be, and that nothing in them ever runs."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from dual_encoder import DualEncoder
from safetensors.torch import save_file
from torch import nn

from pybackdoor.models import CheckpointError, read_checkpoint
from pybackdoor.models.checkpoint import load_weights


def state() -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in DualEncoder(seed=3).state_dict().items()}


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def saved(path: Path, payload: object, *, legacy: bool = False, **options) -> Path:
    torch.save(payload, path, _use_new_zipfile_serialization=not legacy, **options)
    return path


def assert_same(found: dict, wanted: dict) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_tensors_come_back_bit_for_bit(tmp_path, form):
    wanted = state() | {"half": torch.randn(3).half(), "brain": torch.randn(2, 2).bfloat16()}
    if form == "safetensors":
        save_file(wanted, tmp_path / "w.safetensors")
        found = read_checkpoint(tmp_path / "w.safetensors")
        wanted = dict(sorted(wanted.items()))
        found = dict(sorted(found.items()))
    else:
        path = saved(tmp_path / "w.pt", OrderedDict(wanted), legacy=form == "legacy")
        found = read_checkpoint(path)
    assert_same(found, wanted)


@pytest.mark.parametrize("legacy", [False, True])
def test_what_torch_saved_is_not_read_by_a_safetensors_name(tmp_path, legacy):
    path = saved(tmp_path / "w.pt", state(), legacy=legacy).rename(tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="was written by torch.save, whatever its name says"):
        read_checkpoint(path)


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
def test_training_checkpoints_are_unwrapped(tmp_path, wrapper):
    payload = {"epoch": 3, wrapper: state(), "optimizer": {"lr": 1e-3}}
    assert_same(read_checkpoint(saved(tmp_path / "w.pt", payload)), state())


def test_shards_are_read_through_their_index(tmp_path):
    wanted = state()
    names = list(wanted)
    save_file({n: wanted[n] for n in names[:5]}, tmp_path / "a.safetensors")
    save_file({n: wanted[n] for n in names[5:]}, tmp_path / "b.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    places = {n: "ab"[i >= 5] + ".safetensors" for i, n in enumerate(names)}
    index.write_text(json.dumps({"weight_map": places}))
    found = read_checkpoint(index)
    assert_same({n: found[n] for n in names}, wanted)
    for bad in ('{"weight_map": {"x": "../a.safetensors"}}', "[1]", "{", '{"weight_map": {}}'):
        index.write_text(bad)
        with pytest.raises(CheckpointError, match="not a weight index"):
            read_checkpoint(index)


def _zip(entries: dict[str, bytes], compression=zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pt"))
    return buffer.getvalue()


def _safetensors(header: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


ENTRY = b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 605157884\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (LFS, "Git LFS pointer for a file of 605157884 bytes.*git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>Quota exceeded", "is an HTML page"),
        (b"<html>", "is an HTML page"),
        (b"<?xml version='1.0'?><Error>NoSuchKey</Error>", "is an XML page"),
        (b'{"error": "not found"}', r"is a JSON file.*begins '\{\"error\""),
        (b"Access denied\n", "is a text file.*begins 'Access denied"),
        ("Zugriff verweigert: ä".encode() * 60, "is a text file"),
        (gzip.compress(b"weights"), "is a gzip archive"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
        (_tar(), "is a tar archive"),
        (b"PK\x03\x04 and no more", "truncated or damaged zip archive"),
        (_zip({"a.txt": b"x", "b.txt": b"y"}), "not a torch file; it holds a.txt, b.txt"),
        (_zip({}), "not a torch file; it holds nothing"),
        (_zip({"m/data.pkl": b"x", "m/constants.pkl": b"y"}), r"TorchScript \(JIT\) archive"),
        (_zip({"m/data.pkl": b"x", "m/code/m.py": b"y"}), r"TorchScript \(JIT\) archive"),
        (_zip({"m/data.pkl": b"x" * 99}, zipfile.ZIP_DEFLATED), "is a compressed zip"),
        (_zip({"m/data.pkl": b"not a pickle"}), "damaged or truncated torch file"),
        (pickle.dumps({"a": 1}), "a pickle that torch.save did not write"),
        (pickle.dumps(np.float64(1)), r"foreign classes \(numpy\S+scalar, numpy.dtype\)"),
        (b"\x80\x02", "a pickle that torch.save did not write"),
        (b"cos\nsystem\n(S'true'\ntR.", "text pickle naming os.system"),
        (b"\x00\x01\x02\x03\x04\x05\x06\x07\x08", r"no known weight format \(9 bytes.*0x00010203"),
        (_safetensors(b"{]"), "bad safetensors header"),
        (_safetensors(b'{"w": 3}'), "bad safetensors header"),
        (_safetensors(b'{"w":{"data_offsets":[0,"x"]}}'), "bad safetensors header"),
        (_safetensors(b"{" * 90_000), "bad safetensors header"),
        (_safetensors(ENTRY, length=5000), "truncated safetensors file: a header of 5000 bytes"),
        (_safetensors(ENTRY, bytes(9)), "truncated safetensors file: its header wants 79 bytes"),
        (_safetensors(ENTRY, bytes(99)), "damaged safetensors file"),
        (_safetensors(ENTRY.replace(b"F32", b"F99"), bytes(16)), "damaged safetensors file"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_what_is_not_weights_is_told_in_one_sentence(tmp_path, content, message):
    path = written(tmp_path / "weights.bin", content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_places_that_are_no_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a weight file, .*none.pt is missing"):
        read_checkpoint(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_checkpoint(tmp_path)
    path = written(tmp_path / "w.safetensors", b"\xff" * 40)
    with pytest.raises(CheckpointError, match="bad safetensors header"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_real_jit_archive_is_refused_without_running(tmp_path):
    path = tmp_path / "jit.pt"
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)
    with pytest.raises(CheckpointError, match=r"TorchScript \(JIT\) archive"):
        read_checkpoint(path)


def test_overlapping_zip_records_are_refused(tmp_path):
    content = bytearray(_zip({"m/data.pkl": b"x" * 64}))
    entry = content.index(b"PK\x01\x02")
    content[entry + 20 : entry + 28] = struct.pack("<II", 10**6, 10**6)  # the sizes it claims
    with pytest.raises(CheckpointError, match="claim more bytes than it has"):
        read_checkpoint(written(tmp_path / "w.pt", bytes(content)))


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ([torch.zeros(2)], "dict of named tensors, it holds list"),
        ({}, "it holds an empty dict"),
        ({"state_dict": {}}, "it holds an empty dict"),
        ({1: torch.zeros(2)}, "name its tensors by strings, got 1"),
        ({"w": torch.zeros(2), "epoch": 3}, "hold only tensors, 'epoch' is of type int"),
        ({"w": torch.zeros(2, device="meta")}, "plain dense tensors, 'w' is Tensor.*meta"),
        ({"w": torch.eye(2).to_sparse()}, "plain dense tensors, 'w' is Tensor, torch.sparse_coo"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse", "ignore:Sparse invariant checks")
def test_payloads_that_are_no_state_dict(tmp_path, payload, message):
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(saved(tmp_path / "w.pt", payload))


def test_descriptive_members_are_left_out(tmp_path):
    extra = {"context_length": 77, "vocab_size": torch.tensor(50), "text.position_ids": None}
    found = read_checkpoint(saved(tmp_path / "w.pt", state() | extra))
    model = DualEncoder(seed=4)
    load_weights(model, found, source="w.pt")
    assert_same(model.state_dict(), state())


@pytest.mark.parametrize(
    "rename",
    [
        lambda k: f"module.{k}",
        lambda k: f"model.{k}",
        lambda k: f"_orig_mod.{k}",
        lambda k: f"_orig_mod.module.{k}",
        lambda k: f"module.model._orig_mod.{k}",
        lambda k: k.replace("image.", "image._orig_mod."),
    ],
)
def test_wrapping_of_names_is_undone(rename):
    model = DualEncoder(seed=4)
    load_weights(model, {rename(k): v for k, v in state().items()}, source="w.pt")
    assert_same(model.state_dict(), state())


def test_a_prefix_of_the_model_itself_is_kept():
    class Wrapped(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.model = DualEncoder(seed)

    model = Wrapped(4)
    load_weights(model, Wrapped(3).state_dict(), source="w.pt")
    assert_same(model.model.state_dict(), state())


class Tower(nn.Module):
    """Names of open_clip's text tower, under `text.` or not."""

    def __init__(self, nested: bool, bias: bool = False) -> None:
        super().__init__()
        holder = nn.Module() if nested else self
        holder.positional_embedding = nn.Parameter(torch.zeros(4, 2))
        holder.ln_final = nn.LayerNorm(2)
        if nested:
            self.text = holder
        self.visual = nn.Linear(2, 2)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        if bias:
            self.logit_bias = nn.Parameter(torch.full((), -10.0))


@pytest.mark.parametrize("nested", [False, True])
def test_both_places_of_the_text_tower_fit(nested):
    source, target = Tower(nested), Tower(not nested)
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    load_weights(target, source.state_dict(), source="w.pt")
    for name, value in source.state_dict().items():
        other = name.removeprefix("text.") if nested else name
        if not nested and name.startswith(("positional", "ln_final")):
            other = f"text.{name}"
        assert torch.equal(target.state_dict()[other], value), name


def test_logit_scale_shape_and_logit_bias():
    target = Tower(False, bias=True)
    weights = Tower(False).state_dict() | {"logit_scale": torch.tensor([4.5])}
    load_weights(target, weights, source="w.pt")
    assert target.logit_scale.item() == 4.5 and target.logit_bias.item() == 0
    with pytest.raises(CheckpointError, match="1 unexpected in the file: logit_bias"):
        load_weights(Tower(False), target.state_dict(), source="w.pt")


def test_names_and_shapes_that_do_not_fit_are_listed_and_nothing_is_loaded():
    model = DualEncoder(seed=4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights = state()
    del weights["text.1.bias"], weights["logit_scale"]
    weights |= {f"head.{i}.weight": torch.zeros(1) for i in range(12)}
    weights["ln_final.bias"] = torch.zeros(9)
    weights["ln_final.weight"] = torch.ones(8, dtype=torch.int8)
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, weights, source="w.pt")
    text = str(caught.value)
    assert "weights of w.pt must fit the model's 15 tensors" in text
    assert "2 missing in the file: logit_scale, text.1.bias; " in text
    listed = ", ".join(f"head.{i}.weight" for i in range(10))
    assert f"12 unexpected in the file: {listed}, ...;" in text
    assert "2 of another shape or kind: " in text
    assert "ln_final.bias (file [9] float32, model [8] float32)" in text
    assert "ln_final.weight (file [8] int8, model [8] float32)" in text
    assert_same(model.state_dict(), before)


def test_half_weights_widen_exactly_into_a_float_model():
    model = DualEncoder(seed=4)
    narrow = {k: v.bfloat16() if v.is_floating_point() else v for k, v in state().items()}
    load_weights(model, narrow, source="w.pt")
    for name, value in narrow.items():
        assert torch.equal(model.state_dict()[name], value.to(model.state_dict()[name].dtype))
