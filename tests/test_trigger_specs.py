"""Trigger specs: equality, the JSON form, and what bad input gets."""

import json
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pybackdoor.triggers import (
    PLACEMENTS,
    TRIGGERS,
    TriggerSpec,
    apply_trigger,
    bind,
    trigger,
)

IMAGES = np.zeros((2, 32, 32, 3), np.uint8)
DIGEST = "0" * 64


@st.composite
def specs(draw):
    """Any valid spec of any trigger; files are named, not read."""
    definition = TRIGGERS[draw(st.sampled_from(sorted(TRIGGERS)))]
    options = {
        "seed": draw(st.integers(0, 2**63 - 1)),
        "grey": draw(st.booleans()),
        "wrap": draw(st.none() | st.booleans()),
        "per_image": definition.drawn and draw(st.booleans()),
    }
    if "placement" in definition.options:
        options["placement"] = draw(st.none() | st.sampled_from(PLACEMENTS))
        if options["placement"] == "fixed":
            options["position"] = draw(st.tuples(st.integers(0, 300), st.integers(0, 300)))
        options["size"] = draw(st.none() | st.integers(1, 400))
    if "strength" in definition.options:
        options["strength"] = draw(st.none() | st.floats(0, 1))
    for file, digest in (("file", "file_sha256"), ("mask_file", "mask_sha256")):
        if file in definition.options and (file == "file" or draw(st.booleans())):
            options[file] = draw(st.text(min_size=1))
            options[digest] = draw(st.text("0123456789abcdef", min_size=64, max_size=64))
    return TriggerSpec(definition.name, **options)


@settings(deadline=None)  # the machine may be busy
@given(specs())
def test_json_round_trip_gives_an_equal_spec(spec):
    again = TriggerSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec and hash(again) == hash(spec)
    assert replace(spec, seed=spec.seed ^ 1) != spec


@settings(deadline=None)  # the machine may be busy
@given(specs(), st.text().filter(lambda key: key not in TriggerSpec.__dataclass_fields__))
def test_an_unknown_key_is_refused_by_name(spec, key):
    with pytest.raises(ValueError) as caught:
        TriggerSpec.from_dict(spec.to_dict() | {key: 1})
    assert repr([key]) in str(caught.value)


@settings(deadline=None)  # the machine may be busy
@given(specs(), st.data())
def test_a_wrong_type_is_refused_by_name(spec, data):
    written = spec.to_dict()
    key = data.draw(st.sampled_from(sorted(set(written) - {"name"})))
    with pytest.raises(TypeError, match=f"{key} must be"):
        TriggerSpec.from_dict(written | {key: {"no": "option"}})


@pytest.mark.parametrize("key", ["name", "version"])
def test_a_missing_key_is_refused_by_name(key):
    data = trigger("sig").to_dict()
    del data[key]
    with pytest.raises(ValueError, match=f"keys missing: .'{key}'"):
        TriggerSpec.from_dict(data)


def test_a_spec_is_frozen_and_says_all():
    spec = trigger("Blended", strength=np.float32(0.25), seed=np.int64(3))
    assert spec.to_dict() == {
        "name": "blended",
        "seed": 3,
        "per_image": False,
        "grey": False,
        "wrap": False,
        "strength": 0.25,
        "version": 1,
    }
    with pytest.raises(FrozenInstanceError):
        spec.seed = 4


def test_published_defaults():
    strengths = {
        d.name: d.options["strength"] for d in TRIGGERS.values() if "strength" in d.options
    }
    assert strengths == {
        "blended": 0.2,
        "blended_stripes": 0.03,
        "triangles": 0.15,
        "text": 0.5,
        "sig": 60 / 255,
        "blend_file": 0.2,
    }
    clipping = {name for name in TRIGGERS if TRIGGERS[name].clips}
    assert clipping == {"blended", "blended_stripes", "sig"}
    assert trigger("badnet").placement == "random" and trigger("badnet").wrap
    assert trigger("badnet", position=(1, 2)).placement == "fixed"
    assert trigger("badnet", placement="center") == trigger("badnet", placement="centre")


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("badnot", {}, ValueError, r"name must be one of badnet, .*got 'badnot'.*mean 'badnet'"),
        ("zzz", {}, ValueError, r"got 'zzz'$"),
        (3, {}, TypeError, "name must be a string, got int"),
        ("sig", {"colour": 1}, TypeError, r"'sig': options must be among .*got \['colour'\]"),
        ("sig", {"placement": "centre"}, ValueError, "'sig': takes .*strength, got placement"),
        ("wanet", {"strength": 0.5}, ValueError, "'wanet': takes seed, grey, wrap, got strength"),
        ("text", {"per_image": True}, ValueError, "per_image must be False.*got True"),
        ("sig", {"per_image": 1}, TypeError, "per_image must be True or False, got 1"),
        ("sig", {"wrap": "yes"}, TypeError, "wrap must be True or False, got 'yes'"),
        ("sig", {"seed": -1}, ValueError, r"seed must be an integer in \[0, .*got -1"),
        ("sig", {"seed": True}, TypeError, "seed must be an integer .*got True"),
        ("sig", {"strength": 1.5}, ValueError, r"strength must be a number in \[0, 1\], got 1.5"),
        ("sig", {"strength": float("nan")}, ValueError, "strength must be .*got nan"),
        ("sig", {"strength": "1"}, TypeError, "strength must be .*got '1'"),
        ("sig", {"version": 2}, ValueError, "version must be 1, the one .*got 2"),
        ("badnet", {"size": 0}, ValueError, r"size must be an integer in \[1, .*got 0"),
        ("badnet", {"size": 2.0}, TypeError, "size must be an integer .*got 2.0"),
        ("badnet", {"placement": "left"}, ValueError, "placement must be one of .*got 'left'"),
        ("badnet", {"placement": (1, 2)}, TypeError, r"placement must be a string, got \(1, 2\)"),
        ("badnet", {"placement": "fixed"}, ValueError, r"position must be \(y, x\), got None"),
        (
            "badnet",
            {"placement": "centre", "position": (1, 2)},
            ValueError,
            "position must be None",
        ),
        ("badnet", {"position": 4}, TypeError, r"position must be \(y, x\), got 4"),
        (
            "badnet",
            {"position": (1, 2, 3)},
            ValueError,
            r"position must be \(y, x\), got \(1, 2, 3",
        ),
        ("badnet", {"position": (-1, 2)}, ValueError, "position must be an integer .*got -1"),
        ("badclip", {}, ValueError, "file must be the path of a PNG file, got None"),
        ("badclip", {"file": 3}, TypeError, "file must be a path, got 3"),
        ("badclip", {"file": "no.png"}, FileNotFoundError, "file must be an existing PNG, got 'no"),
        (
            "badclip",
            {"file": "x", "file_sha256": "ab"},
            ValueError,
            "file_sha256 must be 64 .*'ab'",
        ),
        ("blend_file", {"mask_sha256": DIGEST}, ValueError, "file must be the path"),
        ("badnet", {"file": "no.png"}, ValueError, "'badnet': takes .*got file"),
    ],
)
def test_bad_options_name_what_was_wanted_and_got(name, options, error, message):
    with pytest.raises(error, match=message):
        trigger(name, **options)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"name": "BadNet"}, ValueError, "name must be one of .*got 'BadNet'"),
        ({"name": None}, TypeError, "name must be a string, got NoneType"),
        ({"name": "badclip", "file": "x"}, ValueError, "file_sha256 must be the file's hash"),
        ({"name": "badclip", "file": 1}, TypeError, "file must be a path as a string, got 1"),
        (
            {"name": "blend_file", "file": "x", "file_sha256": DIGEST, "mask_file": "y"},
            ValueError,
            "mask_sha256 must be the file's hash",
        ),
        ({"name": "sig", "version": None}, TypeError, "version must be an integer, got None"),
    ],
)
def test_a_written_spec_is_read_strictly(fields, error, message):
    with pytest.raises(error, match=message):
        TriggerSpec.from_dict({"version": 1} | fields)


def test_from_dict_wants_a_dict():
    with pytest.raises(TypeError, match="data must be a dict, got list"):
        TriggerSpec.from_dict([])


# Binding and applying


@pytest.mark.parametrize(
    ("spec", "size", "message"),
    [
        (trigger("badnet", size=33), 32, "'badnet' must fit the image of 32 x 32, got 33 x 33$"),
        (trigger("badnet"), 4, "fit the image of 4 x 4, got 5 x 5"),
        (trigger("badnet", position=(20, 28)), 32, r"got 5 x 5 at \(20, 28\)"),
        (trigger("sig"), 0, r"image_size must be in \[1, 32767\], got 0"),
        (trigger("sig"), (32, 2**15), "image_size must be in"),
    ],
)
def test_a_trigger_must_fit_the_image(spec, size, message):
    with pytest.raises(ValueError, match=message):
        bind(spec, size)


@pytest.mark.parametrize("size", ["32", 32.0, (32,), (32, 32, 3), None])
def test_bind_wants_an_image_size(size):
    with pytest.raises(TypeError, match=r"image_size must be an integer or \(H, W\), got"):
        bind(trigger("sig"), size)


def test_bind_wants_a_spec():
    with pytest.raises(TypeError, match="spec must be a TriggerSpec, got str"):
        bind("sig", 32)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (IMAGES.astype(np.float32), TypeError, r"\[B, H, W, 3\] uint8 .*got float32"),
        (torch.zeros(1, 8, 8, 3), TypeError, "uint8 .*got torch.float32"),
        ([[0]], TypeError, "got list"),
        (IMAGES[0], ValueError, r"got shape \(32, 32, 3\)"),
        (IMAGES[..., :1], ValueError, r"got shape \(2, 32, 32, 1\)"),
        (IMAGES.transpose(0, 3, 1, 2), ValueError, r"got shape \(2, 3, 32, 32\)"),
        (IMAGES[:, :0], ValueError, r"got shape \(2, 0, 32, 3\)"),
    ],
)
def test_apply_wants_uint8_images(images, error, message):
    with pytest.raises(error, match=f"apply_trigger: images must be .*{message}"):
        apply_trigger(images, trigger("sig"), range(2))


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([1], ValueError, r"sample_ids must be \[2\], got \[1\]"),
        ([1.0, 2], TypeError, "sample_ids must be integers, got .*float"),
        ([True, 2], TypeError, "sample_ids must be integers, got True"),
        (np.zeros(2), TypeError, "sample_ids must be integers"),
        (np.zeros((2, 1), int), ValueError, r"sample_ids must be \[B\], got \(2, 1\)"),
        ([0, 2**63], ValueError, "sample_ids must fit int64, got 9223372036854775808"),
        (None, TypeError, "sample_ids must be integers, got .*NoneType"),
    ],
)
def test_apply_wants_one_integer_id_per_image(ids, error, message):
    with pytest.raises(error, match=f"apply_trigger: {message}"):
        apply_trigger(IMAGES, trigger("sig"), ids)


def test_a_bound_trigger_fits_its_size_alone():
    with pytest.raises(ValueError, match=r"must be of \(32, 32\) on cpu .*got \(16, 16\) on cpu"):
        apply_trigger(IMAGES, bind(trigger("sig"), 16), range(2))
    assert "sig" in repr(bind(trigger("sig"), 16))
