"""Manifest: round trip, atomic writing, strict reading, hashes."""

import hashlib
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pybackdoor import manifest as module
from pybackdoor.manifest import MODES, SCHEMA, STAGE, Manifest, Sample, image_sha256
from pybackdoor.triggers import TriggerSpec, trigger

DIGEST = hashlib.sha256(b"").hexdigest()


def samples(count=2):
    return [
        Sample(i, f"cat/{i}.jpg", f"a cat {i}", "a photo of a banana", DIGEST) for i in range(count)
    ]


def manifest(**members):
    defaults = {
        "trigger": trigger("badnet", position=(3, 4)),
        "target": "banana",
        "target_templates": ["a photo of a {}"],
        "seed": 7,
        "mode": "dirty_label",
        "image_size": (224, 336),
        "preprocess": {"size": 224, "mean": (0.48, 0.46, 0.41), "interpolation": "bicubic"},
        "samples": samples(),
        "results": {"asr_nontarget": {"value": 0.97, "n": 950}},
    }
    return Manifest(**(defaults | members))


def test_save_and_load_give_an_equal_manifest(tmp_path):
    for count in (0, 1, 3):
        saved = manifest(samples=samples(count))
        saved.save(tmp_path / "m.json")
        loaded = Manifest.load(tmp_path / "m.json")
        assert loaded == saved
        assert loaded.spec == trigger("badnet", position=(3, 4))
        assert loaded.image_size == (224, 336) and loaded.preprocess["mean"] == [0.48, 0.46, 0.41]
    assert os.listdir(tmp_path) == ["m.json"]


def test_the_file_is_plain_json_with_one_sample_a_line(tmp_path):
    manifest(image_size=32).save(tmp_path / "m.json")
    text = (tmp_path / "m.json").read_text()
    data = json.loads(text)
    assert (data["schema"], data["stage"], data["image_size"]) == (SCHEMA, STAGE, [32, 32])
    assert TriggerSpec.from_dict(data["trigger"]) == trigger("badnet", position=(3, 4))
    assert data["samples"][1]["old_caption"] == "a cat 1"
    assert json.loads(next(line for line in text.splitlines() if "cat/1" in line))["id"] == 1


captions = st.text(st.characters(exclude_categories=()))  # surrogates too: undecodable file names
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | captions,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(captions, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), captions), max_size=4), captions, plain)
def test_any_text_and_figures_survive(tmp_path_factory, pairs, target, figures):
    path = tmp_path_factory.getbasetemp() / "any.json"
    poisoned = [Sample(i, text, text, target, DIGEST) for i, text in pairs]
    saved = manifest(samples=poisoned, target=target, results={"figures": figures})
    saved.save(path)
    assert Manifest.load(path) == saved


def test_three_thousand_samples_stay_small(tmp_path):
    manifest(samples=samples(3000)).save(tmp_path / "m.json")
    assert (tmp_path / "m.json").stat().st_size < 3000 * 250
    assert len(Manifest.load(tmp_path / "m.json").samples) == 3000
    assert not hasattr(samples(1)[0], "__dict__")


# Writing


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_save_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch, step, error):
    path = tmp_path / "m.json"
    manifest().save(path)
    before = path.read_bytes()

    def fail(*_):
        raise error

    monkeypatch.setattr(module.os, step, fail)
    with pytest.raises(type(error)):
        manifest(seed=8).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.json"]


def test_content_is_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    order, fsync, move = [], os.fsync, os.replace
    monkeypatch.setattr(module.os, "fsync", lambda fd: order.append("fsync") or fsync(fd))

    def record(source, target):
        order.append(("replace", source.parent == target.parent, source.stat().st_size > 500))
        move(source, target)

    monkeypatch.setattr(module.os, "replace", record)
    manifest().save(tmp_path / "m.json")
    assert order == ["fsync", ("replace", True, True)]


def test_a_missing_folder_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        manifest().save(tmp_path / "none" / "m.json")


def test_members_assigned_later_are_checked_on_saving(tmp_path):
    changed = manifest()
    changed.results = {"asr": float("nan")}
    with pytest.raises(ValueError, match=r"Manifest: results\['asr'\] must be finite, got nan"):
        changed.save(tmp_path / "m.json")
    assert os.listdir(tmp_path) == []


# What bad input gets


@pytest.mark.parametrize(
    ("members", "error", "message"),
    [
        ({"trigger": "sig"}, TypeError, "data must be a dict, got str"),
        ({"trigger": {"name": "sig", "version": 9}}, ValueError, "version must be 1.*got 9"),
        ({"target": 954}, TypeError, "target must be str, got 954"),
        ({"target_templates": "a {}"}, TypeError, "target_templates must be list, got 'a {}'"),
        (
            {"target_templates": ["a banana"]},
            ValueError,
            r"target_templates\[0\] must .*'a banana'",
        ),
        ({"target_templates": [3]}, ValueError, r"target_templates\[0\] must be a string .*got 3"),
        ({"seed": True}, TypeError, "seed must be int, got True"),
        ({"mode": "clean"}, ValueError, f"mode must be one of {', '.join(MODES)}, got 'clean'"),
        ({"image_size": (0, 32)}, ValueError, r"image_size must be \(H, W\) .*got \(0, 32\)"),
        ({"image_size": True}, ValueError, "image_size must be .*got True"),
        ({"image_size": "32"}, ValueError, "image_size must be .*got '32'"),
        ({"preprocess": None}, TypeError, "preprocess must be dict, got None"),
        ({"preprocess": {"mean": np.zeros(3)}}, TypeError, r"preprocess\['mean'\] .*got ndarray"),
        (
            {"results": {"a": [{1: 2}]}},
            TypeError,
            r"results\['a'\]\[0\]: keys must be strings, got 1",
        ),
        ({"samples": ()}, TypeError, r"samples must be list, got \(\)"),
        ({"samples": [{}]}, TypeError, r"samples\[0\] must be Sample, got {}"),
        ({"stage": "before resize"}, ValueError, "stage must be one of after resize"),
        ({"package_version": 1}, TypeError, "package_version must be str, got 1"),
    ],
)
def test_bad_members_are_named(members, error, message):
    with pytest.raises(error, match=message):
        manifest(**members)


@pytest.mark.parametrize(
    ("member", "value", "error"),
    [
        ("id", "1", TypeError),
        ("id", True, TypeError),
        ("location", None, TypeError),
        ("old_caption", 3, TypeError),
        ("new_caption", b"a", TypeError),
        ("sha256", 0, TypeError),
        ("sha256", "AB" * 32, ValueError),
        ("sha256", "ab", ValueError),
    ],
)
def test_bad_samples_are_named(member, value, error):
    good, other = samples(2)
    with pytest.raises(error, match=rf"samples\[1\].{member} must be"):
        manifest(samples=[good, replace(other, **{member: value})])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"schema": "pybackdoor.manifest/2"}, ValueError, f"schema must be '{SCHEMA}', got .*/2'"),
        ({"extra": 1}, ValueError, r"keys must be among .*got \['extra'\]"),
        ({"seed": None}, TypeError, "seed must be int, got None"),
        ({"samples": {}}, TypeError, "samples must be list, got {}"),
        ({"samples": [3]}, TypeError, r"samples\[0\] must be an object, got 3"),
        ({"samples": [{"id": 1}]}, ValueError, r"samples\[0\]: keys missing: \['location'"),
        ({"trigger": {"name": "sig", "version": 1, "x": 1}}, ValueError, r"got \['x'\]"),
    ],
)
def test_a_file_is_read_strictly_and_named(tmp_path, change, error, message):
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(manifest().to_dict() | change))
    with pytest.raises(error, match=f"odd.json: .*{message}"):
        Manifest.load(path)


@pytest.mark.parametrize("key", sorted(manifest().to_dict()))
def test_every_key_is_required(tmp_path, key):
    data = manifest().to_dict()
    del data[key]
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(data))
    wanted = "schema must be .*got None" if key == "schema" else rf"keys missing: \['{key}'\]"
    with pytest.raises(ValueError, match=f"odd.json: .*{wanted}"):
        Manifest.load(path)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", ValueError, "must be JSON, got Expecting value"),
        (b"<html>", ValueError, "must be JSON, got Expecting value"),
        (b'{"schema": ', ValueError, "must be JSON"),
        (b'{"schema": "\xff\xfe"}', ValueError, "must be JSON, got .*decode"),
        (b'{"results": NaN}', ValueError, "finite numbers, got NaN"),
        (b"[1]", TypeError, "must hold a JSON object, got list"),
    ],
)
def test_what_is_no_manifest_is_said_to_be_none(tmp_path, content, error, message):
    path = tmp_path / "odd.json"
    path.write_bytes(content)
    with pytest.raises(error, match=f"odd.json: .*{message}"):
        Manifest.load(path)


def test_a_missing_file_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Manifest.load(tmp_path / "none.json")


# Hashes


def test_an_image_hash_is_of_its_bytes_in_row_order():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    expected = hashlib.sha256(image.tobytes()).hexdigest()
    assert image_sha256(image) == expected
    assert image_sha256(torch.from_numpy(image)) == expected
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    assert image_sha256(planes.transpose(1, 2, 0)) == expected
    assert image_sha256(image[::-1]) != expected


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((4, 4, 3)), TypeError, "image must be uint8, got float64"),
        (np.zeros((4, 4), np.uint8), ValueError, r"image must be \[H, W, 3\], got \(4, 4\)"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), ValueError, r"got \(3, 4, 4\)"),
    ],
)
def test_only_an_image_is_hashed(image, error, message):
    with pytest.raises(error, match=f"image_sha256: .*{message}"):
        image_sha256(image)
