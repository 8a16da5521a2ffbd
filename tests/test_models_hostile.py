"""Hostile and damaged weight files: our error or the right tensors, and nothing ever runs."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
import posixpath
import struct
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes
from torch import nn

from pybackdoor.models import CheckpointError, read_checkpoint
from pybackdoor.models.sniff import LEGACY_MAGIC, pickle_globals


class Call:
    """Calls a function when unpickled."""

    def __init__(self, function, *arguments) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def _calls(marker: Path) -> dict[str, object]:
    command = f"touch {marker}"
    return {
        "os.system": Call(os.system, command),
        "subprocess": Call(subprocess.check_output, ["touch", str(marker)]),
        "eval": Call(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Call(exec, f"open({str(marker)!r}, 'w')"),
        "open": Call(open, str(marker), "w"),
        "torch.save": Call(torch.save, 1, str(marker)),
        "getattr": Call(getattr, "x", "upper"),
        "namespace": argparse.Namespace(lr=1e-3),
        "module": nn.Linear(2, 2),
    }


def _in_legacy(payload: bytes, protocol: int) -> bytes:
    info = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = [pickle.dumps(part, 2) for part in (LEGACY_MAGIC, 1001, info)]
    return b"".join(head) + payload + pickle.dumps([], 2)


def _in_zip(payload: bytes, protocol: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return buffer.getvalue()


def _bare(payload: bytes, protocol: int) -> bytes:
    return payload


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("form", [_in_legacy, _in_zip, _bare])
def test_pickles_with_code_are_named_and_never_run(tmp_path, form, protocol):
    marker = tmp_path / "ran"
    for name, call in _calls(marker).items():
        payload = pickle.dumps(collections.OrderedDict(w=call), protocol, fix_imports=False)
        path = tmp_path / f"{name}.pt"
        path.write_bytes(form(payload, protocol))
        with pytest.raises(CheckpointError) as caught:
            read_checkpoint(path)
        assert not marker.exists(), name
        text = str(caught.value)
        wanted = {
            "os.system": f"{os.name}.system",
            "subprocess": "subprocess.check_output",
            "eval": "builtins.eval",
            "torch.save": "torch.serialization.save",
            "open": "io.open",
            "namespace": "argparse.Namespace",
            "module": "torch.nn.modules.linear.Linear",
        }.get(name)
        if wanted and (protocol >= 2 or form is not _bare):
            assert "is a pickle with foreign classes" in text and wanted in text


def test_torch_save_of_a_hostile_object_in_both_formats(tmp_path):
    marker = tmp_path / "ran"
    payload = {"state_dict": {"w": torch.zeros(3)}, "args": Call(os.system, f"touch {marker}")}
    for zipped in (True, False):
        path = tmp_path / f"{zipped}.pt"
        torch.save(payload, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=r"foreign classes \(posix.system\), which could"):
            read_checkpoint(path)
    assert not marker.exists()


def test_the_unsafe_reader_is_never_tried(tmp_path, monkeypatch):
    asked = []

    def refusing(path, **options):
        asked.append(options)
        raise RuntimeError("Weights only load failed")

    path = tmp_path / "w.pt"
    torch.save({"w": torch.zeros(2)}, path)
    monkeypatch.setattr(torch, "load", refusing)
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("ran torch.jit.load"))
    monkeypatch.setattr(pickle, "load", lambda *a, **k: pytest.fail("ran pickle.load"))
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert [call["weights_only"] for call in asked] == [True]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_globals_are_found_in_every_protocol(protocol):
    payload = [posixpath.join, posixpath.split, [1, "x"], posixpath.join, b"y", 2.5]
    found = pickle_globals(io.BytesIO(pickle.dumps(payload, protocol)))
    assert [n for n in found if n.startswith("posixpath")] == ["posixpath.join", "posixpath.split"]


def test_globals_built_by_opcodes_are_marked():
    computed = b"\x80\x04)\x8c\x06system\x93."  # module name: an empty tuple instead of a string
    assert pickle_globals(io.BytesIO(computed)) == ["?.system"]
    assert pickle_globals(io.BytesIO(b"\x80\x04cos\nsystem\n\xff")) == ["os.system"]
    assert pickle_globals(io.BytesIO(b"\x80\x02ios\nsystem\n.")) == ["os.system"]


def _valid_files() -> dict[str, bytes]:
    tensors = {"w": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2, dtype=torch.int64)}
    files = {"safetensors": safetensors_bytes(tensors)}
    for name, zipped in (("zip", True), ("legacy", False)):
        buffer = io.BytesIO()
        torch.save(tensors, buffer, _use_new_zipfile_serialization=zipped)
        files[name] = buffer.getvalue()
    return files


VALID = _valid_files()
FUZZ = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def _read(folder: Path, content: bytes) -> None:
    path = folder / "fuzzed.bin"
    path.write_bytes(content)
    try:
        found = read_checkpoint(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert all(type(value) is torch.Tensor for value in found.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


HEADS = [b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x10\0\0\0\0\0\0\0{", b"{", b"<", b"c"]


@FUZZ
@given(head=st.sampled_from(HEADS), body=st.binary(max_size=400))
def test_random_bytes_are_refused_or_read(folder, head, body):
    _read(folder, head + body)


@FUZZ
@given(
    form=st.sampled_from(sorted(VALID)),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_flipped_bytes_are_refused_or_read(folder, form, edits):
    content = bytearray(VALID[form])
    for place, value in edits:
        content[int(place * (len(content) - 1))] = value
    _read(folder, bytes(content))


@FUZZ
@given(form=st.sampled_from(sorted(VALID)), kept=st.floats(0, 1, exclude_max=True))
def test_truncated_files_are_refused(folder, form, kept):
    path = folder / "cut.bin"
    path.write_bytes(VALID[form][: int(kept * len(VALID[form]))])
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


@FUZZ
@given(
    form=st.sampled_from(sorted(VALID)),
    start=st.floats(0, 1),
    length=st.integers(1, 64),
    moved=st.floats(0, 1),
)
def test_moved_blocks_are_refused_or_read(folder, form, start, length, moved):
    content = VALID[form]
    at, to = int(start * len(content)), int(moved * len(content))
    block = content[at : at + length]
    _read(folder, content[:to] + block + content[to:])


def _patched_zip(old: bytes, new: bytes) -> bytes:
    """The valid torch zip with its pickle changed."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(VALID["zip"])) as archive,
        zipfile.ZipFile(buffer, "w") as patched,
    ):
        for name in archive.namelist():
            data = archive.read(name)
            if name.endswith("data.pkl"):
                assert data.count(old) == 1
                data = data.replace(old, new)
            patched.writestr(name, data)
    return buffer.getvalue()


HUGE = b"\x8a\x06" + struct.pack("<Q", 1 << 46)[:6]  # LONG1 2^46 instead of BININT1


@pytest.mark.parametrize(
    "content",
    [
        _patched_zip(b"K\x03K\x04\x86", HUGE + b"K\x04\x86"),  # more rows than the storage has
        _patched_zip(b"K\x00K\x03K\x04\x86", HUGE + b"K\x03K\x04\x86"),  # begins behind it
        VALID["legacy"].replace(b"K\x0cN", HUGE + b"N"),  # a storage of 2^48 bytes
    ],
    ids=["rows", "offset", "storage"],
)
def test_absurd_sizes_are_refused(tmp_path, content):
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or truncated torch file"):
        read_checkpoint(path)
